"""Dry run: one rank of any world builds its model and makes a step on tensors without memory.

- The modules, schedule, gradient buffer, optimizer and groups are those of a run. Tensors are on
  torch's meta device, which stands for an accelerator; the process group is torch's fake one.
- It shows the peak by kind, FLOPs and every collective, beside what the plan says.
- A second forward pass follows the step: with overlap the gathers of new weights end there.

What differs from a run on a device:
- Kernels are the forms that need no device: flash attention by its shapes, the norm, rotary split,
  SwiGLU, loss and update of this project. No memory is rounded up as an allocator does.
- Attention that stops at document borders keeps what flash attention keeps.

Alternatives considered:
- Running rank by rank with values: a rank of K2 needs 34 GiB.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from k2train.config.load import Config
from k2train.data.loader import MicroBatch
from k2train.errors import ConfigError
from k2train.model.kernels.select import Documents, Kernels
from k2train.parallel.grid import ProcessGrid
from k2train.plan.action import Action
from k2train.plan.balance import stage_flops
from k2train.plan.memory import RankMemory
from k2train.train.dry_trace import KEPT, StepTrace, Transfer
from k2train.train.engine import Engine
from k2train.train.setup import Setup
from k2train.train.setup_kernels import kernels_of

BACKEND = "fake"
META = torch.device("meta")
FORMS = {
    "attention": "flash",
    "norm": "fused",
    "elementwise": "fused",
    "loss": "fused",
    "matmul": "torch",
    "optimizer": "fused",
    "compile": "off",
}
"""Kernels of a dry run, by key of `kernels`."""


@dataclass(frozen=True)
class DryRun:
    """What one rank does in a step, and what was planned for it."""

    rank: int
    coordinate: str
    num_microbatches: int
    state_bytes: int
    """Bytes that exist between steps."""
    peak_bytes: int
    at_peak: dict[str, int]
    """Bytes at the peak, by kind."""
    flops: dict[str, int]
    transfers: tuple[Transfer, ...]
    planned: RankMemory
    planned_flops: int
    """Of this rank in a step, by the plan; without what recomputation adds."""


def dry_run(config: Config, world_size: int, rank: int) -> DryRun:
    """Build and step `rank` of a world. Raises ConfigError.

    The process must have no process group; afterwards it has none again.
    """
    if config.run.exact:
        raise ConfigError("a dry run does not know run.exact (true); set run.exact=false")
    if not 0 <= rank < world_size:
        raise ConfigError(f"--rank ({rank}) must be from 0 to {world_size - 1}")
    config = _with_forms(config)
    setup = Setup.of(config, world_size)

    with fake_world(rank, world_size):
        grid = ProcessGrid(setup.layout, rank, META, host_backend=BACKEND)
        trace = StepTrace(_axis_names(grid))
        kernels = replace(kernels_of(_attending(setup), META), attention=_flash)
        with trace:
            engine = _build(setup, grid, kernels, trace)
            state = trace.live_bytes
            _step(engine, trace)
        return _result(setup, grid, trace, state)


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Be `rank` of a world of which no other process exists."""
    dist.init_process_group(BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _with_forms(config: Config) -> Config:
    """Replace the kernels by those of a dry run, and an open precision by a device's."""
    kernels = config.kernels.model_copy(update=FORMS)
    precision = "bf16" if config.precision == "auto" else config.precision
    return config.model_copy(update={"kernels": kernels, "precision": precision})


def _attending(setup: Setup) -> Setup:
    """Let attention cross document borders: `_flash` stands for the kernels that stop there."""
    data = setup.config.data.model_copy(update={"cross_documents": "attend"})
    return replace(setup, config=setup.config.model_copy(update={"data": data}))


def _flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Flash attention by its shapes: q [b, n, s, d], k and v [b, n_kv, s, d] -> [b, n, s, d]."""
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    out: Tensor = found[0]
    return out


def _axis_names(grid: ProcessGrid) -> dict[str, str]:
    """Axis of each process group by its name; axes of the same ranks share one."""
    names: dict[str, list[str]] = {}
    for axis in (grid.tp, grid.dp, grid.pp, grid.stage):
        if axis.group is not None:
            names.setdefault(axis.group.group_name, []).append(axis.name)
    return {name: "+".join(axes) for name, axes in names.items()}


def _build(setup: Setup, grid: ProcessGrid, kernels: Kernels, trace: StepTrace) -> Engine:
    """Build the engine and count its state by kind."""
    engine = Engine(setup, grid, fill=False, kernels=kernels)
    trace.mark("tables")
    trace.mark("weights", (p for stage in engine.stages.values() for p in stage.parameters()))
    trace.mark("gradients", (engine.gradients._sums, engine.gradients.shard))
    trace.mark("optimizer", engine.optimizer.flat_shards.values())
    return engine


def _step(engine: Engine, trace: StepTrace) -> None:
    """Make one step, and the first forward of the next."""
    batch = _batch(engine)
    trace.mark("batch")
    trace.restart()

    def begin(action: Action) -> None:
        trace.during = action.op.name

    def keep(action: Action) -> None:
        # What outlives its action waits for a later one.
        trace.mark(KEPT)

    def enter(phase: str) -> None:
        trace.during = phase

    engine.watch_actions = (keep, begin)
    engine.on_phase = enter
    step = engine.compute_gradients(batch)
    decision = step.decision
    enter("update")
    engine.optimizer.step(step.gradient, 1e-4, decision.divisor, decision.skip)
    flops, transfers = dict(trace.flops), list(trace.transfers)

    engine.forward(engine.forward_program(1), batch[:1], lambda hidden, microbatch: hidden)
    engine.optimizer.finish()
    # Of the step alone.
    trace.flops.clear()
    trace.flops.update(flops)
    trace.transfers[:] = transfers


def _batch(engine: Engine) -> list[MicroBatch]:
    """Micro-batches of a step, without values; each row is one document."""
    setup = engine.setup
    shape = (setup.config.batch.micro_sequences, setup.config.data.sequence_length)

    def part() -> MicroBatch:
        tokens = torch.zeros(shape, dtype=torch.int64, device=META)
        if not setup.block:
            return MicroBatch(tokens)
        ids = torch.zeros(shape, dtype=torch.int32)
        return MicroBatch(tokens, ids.to(META), host_documents=ids)

    return [part() for _ in range(setup.num_microbatches)]


def _result(setup: Setup, grid: ProcessGrid, trace: StepTrace, state: int) -> DryRun:
    c, layout = grid.coordinate, grid.layout
    length = setup.config.data.sequence_length
    stages = layout.stages_of(c.pp)
    per_token = sum(stage_flops(setup.architecture, layout, s, length) for s in stages)
    tokens = setup.num_microbatches * setup.config.batch.micro_sequences * length
    return DryRun(
        grid.rank,
        f"pp {c.pp}, dp {c.dp}, tp {c.tp}",
        setup.num_microbatches,
        state,
        trace.peak_bytes,
        {kind: size for kind, size in sorted(trace.at_peak.items()) if size},
        dict(trace.flops),
        tuple(trace.transfers),
        setup.memory(setup.work("cuda"), c.pp),
        per_token * tokens // layout.tensor,
    )
