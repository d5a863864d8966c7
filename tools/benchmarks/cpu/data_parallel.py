"""Data-parallel contenders of torch: DDP or FSDP2 (option `kind`) over the reference model.

- DDP with buckets as gradients, and no communication before the last micro-batch.
- FSDP2 with every block and the root sharded; gradients are reduced after the last micro-batch
  only.
- Both follow their guides.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cpu.contract import Built
from benchmarks.cpu.llama import DTYPES, Llama, batches, global_batch, loss_of, trained
from benchmarks.cpu.work import Work


def build(work: Work, precision: str, options: Mapping[str, Any], rank: int, world: int) -> Built:
    """Give each rank its share of the global batch, in micro-batches of the same size."""
    torch.manual_seed(work.seed)
    model = Llama(work, dtype=DTYPES[precision])
    run, ahead = _ddp(model) if options["kind"] == "ddp" else _fsdp2(model, world)
    return trained(model, loss_of(run), batches(global_batch(work), rank, world), work, ahead)


def _ddp(model: Llama) -> tuple[Callable[..., Any], Callable[[bool], None]]:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def ahead(last: bool) -> None:
        # What the context manager no_sync() does; a context manager cannot span a callback.
        wrapped.require_backward_grad_sync = last

    return wrapped, ahead


def _fsdp2(model: Llama, world: int) -> tuple[Callable[..., Any], Callable[[bool], None]]:
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, model.set_requires_gradient_sync
