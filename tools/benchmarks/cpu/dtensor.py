"""Tensor-parallel contender of torch: DTensor over the reference model, option `sequence` parallel.

The plan is that of torch's tutorials and of torchtitan: column-wise, then row-wise, embedding
row-wise, head column-wise with the loss over its shards (`loss_parallel`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.cpu.contract import Built
from benchmarks.cpu.llama import DTYPES, Llama, global_batch, loss_of, mean_loss, trained
from benchmarks.cpu.work import Work


def build(work: Work, precision: str, options: Mapping[str, Any], rank: int, world: int) -> Built:
    """Shard every matrix over all ranks; each rank sees the whole batch."""
    torch.manual_seed(work.seed)
    model = Llama(work, dtype=DTYPES[precision])
    shard(
        model, init_device_mesh("cpu", (world,)), bool(options.get("sequence")), local_logits=False
    )
    built = trained(model, loss_of(model), global_batch(work), work)
    return dataclasses.replace(built, step=loss_parallel()(built.step))


def shard(model: Llama, mesh: DeviceMesh, sequence: bool, local_logits: bool) -> None:
    """Shard the model's matrices.

    With `local_logits` outputs are plain tensors, as a pipeline needs.
    """
    between = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {}
    if model.embedding is not None:
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    for number in model.blocks:
        block = f"blocks.{number}"
        if sequence:
            plan |= {
                f"{block}.attention_norm": SequenceParallel(),
                f"{block}.mlp_norm": SequenceParallel(),
            }
            plan[f"{block}.attention"] = PrepareModuleInput(
                input_layouts=(Shard(1), None, None),
                desired_input_layouts=(Replicate(), None, None),
            )
            plan[f"{block}.mlp"] = PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            )
        columns = ("attention.query", "attention.key", "attention.value", "mlp.gate", "mlp.up")
        plan |= {f"{block}.{name}": ColwiseParallel() for name in columns}
        plan |= {
            f"{block}.{name}": RowwiseParallel(output_layouts=between)
            for name in ("attention.output", "mlp.down")
        }

    if model.head is not None:
        if sequence:
            plan["norm"] = SequenceParallel()
        plan["head"] = ColwiseParallel(input_layouts=between, use_local_output=local_logits)

    parallelize_module(model, mesh, plan)


def sharded_loss(mesh: DeviceMesh) -> Any:
    """`mean_loss` of logits that are each rank's columns [b, s, v/tp].

    Call it in `loss_parallel()`.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(DTensor.from_local(logits, mesh, [Shard(-1)], run_check=False), labels)

    return loss
