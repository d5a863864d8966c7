"""Pipeline contender of torch: torch.distributed.pipelining over the reference model.

- Option `schedule` is the name of its class without `Schedule`.
- Option `tensor`: DTensor tensor and sequence parallelism in each stage; activations are sent
  between stages in their shards.
- Layers are split evenly, as its own splitters do. Option `balanced`: so that ranks have equal work
  with the head, the cut that k2train gives itself (`k2train.plan.balance`).
- `ZBVZeroBubble` places stages in a V.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import pipelining
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.distributed.tensor.parallel import loss_parallel

from benchmarks.cpu.contract import Built
from benchmarks.cpu.dtensor import shard, sharded_loss
from benchmarks.cpu.llama import (
    DTYPES,
    FusedAdamW,
    Llama,
    global_batch,
    labels_of,
    mean_loss,
    size_of,
)
from benchmarks.cpu.work import Work, layers_of_stages
from k2train.plan.layout import Layout
from k2train.plan.schedule import pipeline_layout


def build(work: Work, precision: str, options: Mapping[str, Any], rank: int, world: int) -> Built:
    """Ranks are pipeline x tensor, tensor innermost."""
    kind, tensor = (
        getattr(pipelining, f"Schedule{options['schedule']}"),
        int(options.get("tensor", 1)),
    )
    mesh = init_device_mesh("cpu", (world // tensor, tensor), mesh_dim_names=("pp", "tp"))
    pp_group, pp, degree = mesh["pp"].get_group(), mesh["pp"].get_local_rank(), world // tensor
    mine = _stages(options["schedule"], issubclass(kind, PipelineScheduleMulti), pp, degree)
    count = degree * len(mine)
    torch.manual_seed(work.seed)
    layout = _layout(options["schedule"], degree)
    cut = layers_of_stages(work, layout, bool(options.get("balanced")))
    models = [Llama(work, cut[stage], DTYPES[precision]) for stage in mine]
    if tensor > 1:
        for model in models:
            shard(model, mesh["tp"], sequence=True, local_logits=True)

    cpu = torch.device("cpu")
    stages = [
        PipelineStage(m, s, count, cpu, group=pp_group) for m, s in zip(models, mine, strict=True)
    ]
    loss = sharded_loss(mesh["tp"]) if tensor > 1 else mean_loss
    microbatches = work.global_sequences // work.micro_sequences
    schedule = kind(
        stages if issubclass(kind, PipelineScheduleMulti) else stages[0], microbatches, loss_fn=loss
    )
    batch = global_batch(work)
    labels = labels_of(batch)
    optimizer = FusedAdamW(work, [p for model in models for p in model.parameters()])

    def step() -> float | None:
        losses: list[torch.Tensor] = []
        with loss_parallel() if tensor > 1 else contextlib.nullcontext():
            _run(
                schedule,
                batch if 0 in mine else None,
                labels if count - 1 in mine else None,
                losses,
            )
        optimizer.step()
        return float(torch.stack([x.detach() for x in losses]).mean()) if losses else None

    return Built(step, _parameters(models, pp_group))


def _run(
    schedule: Any,
    batch: torch.Tensor | None,
    labels: torch.Tensor | None,
    losses: list[torch.Tensor],
) -> None:
    given = () if batch is None else (batch,)
    wanted = {} if labels is None else {"target": labels, "losses": losses}
    schedule.step(*given, **wanted, return_outputs=False)


def _stages(name: str, several: bool, pp: int, degree: int) -> list[int]:
    """Stages of this rank; two where the schedule takes several."""
    if not several:
        return [pp]
    return [pp, 2 * degree - 1 - pp] if "V" in name else [pp, pp + degree]


def _layout(name: str, degree: int) -> Layout:
    """Which rank has which stage under a schedule."""
    if name in ("1F1B", "GPipe"):
        return pipeline_layout("1f1b", degree)
    return pipeline_layout("zb-v" if "V" in name else "interleaved", degree, 2)


def _parameters(models: list[Llama], group: dist.ProcessGroup) -> int:
    total = torch.tensor(size_of([p for model in models for p in model.parameters()]))
    dist.all_reduce(total, group=group)
    return int(total)
