"""Parts of an engine, built from its setup: pipeline stages, optimizer, programs of forwards.

- Functions without state: the engine keeps what they return.
"""

from collections.abc import Sequence

import torch
from torch import nn

from k2train.data.loader import MicroBatch
from k2train.model.architecture import Architecture
from k2train.model.initialize import materialize
from k2train.model.kernels.select import Documents, Kernels
from k2train.model.transformer import Stage
from k2train.optim.adamw import Hyperparameters, ShardedAdamW
from k2train.optim.exact_norm import ExactSquareSums
from k2train.optim.grad_norm import SquareSums
from k2train.parallel.grad_buffer import GradientBuffer
from k2train.parallel.grid import Axis, ProcessGrid
from k2train.plan.layout import Layout
from k2train.plan.schedule import Op, Program, insert_transfers
from k2train.train.exact_mode import ExactMode
from k2train.train.setup import Setup


def build_stages(
    grid: ProcessGrid,
    architecture: Architecture,
    tp: Axis,
    kernels: Kernels,
    dtype: torch.dtype,
) -> dict[int, Stage]:
    """Return the pipeline stages of this rank by their global number, with empty weights."""
    layout = grid.layout

    def build(stage: int) -> Stage:
        layers = layout.layers_of(stage, architecture.num_layers)
        first, last = stage == 0, stage == layout.num_stages - 1
        module = materialize(
            lambda: Stage(architecture, layers, first, last, tp, kernels), dtype, grid.device
        )
        assert isinstance(module, Stage), "a stage was built"
        return module

    return {stage: build(stage) for stage in layout.stages_of(grid.pp.rank)}


def documents_of(batch: MicroBatch) -> Documents:
    """Return the documents of a micro-batch, where attention stops at their borders."""
    assert batch.documents is not None, "the micro-batch was read without its documents"
    return Documents(batch.documents, batch.host_documents)


def check_batch(
    setup: Setup, batch: Sequence[MicroBatch], num_microbatches: int, needed: bool
) -> None:
    """Assert that a batch has so many micro-batches, if this rank reads it, and documents."""
    assert len(batch) == num_microbatches or not needed, (
        f"{len(batch)} micro-batches, planned {num_microbatches}"
    )
    assert all((part.documents is not None) == setup.block for part in batch), (
        f"documents are {'missing' if setup.block else 'given'}, but "
        f"data.cross_documents is {setup.config.data.cross_documents}"
    )


def build_gradients(
    setup: Setup,
    modules: Sequence[nn.Module],
    dp: Axis,
    tp: Axis,
    device: torch.device,
    exact: ExactMode | None,
) -> GradientBuffer:
    """Return the gradient buffer of the stages of this rank."""
    if exact is not None:
        return exact.gradients(modules, dp, tp, device)
    limit = setup.config.parallel.bucket_bytes
    return GradientBuffer(modules, dp, tp, device, setup.num_microbatches, limit)


def square_sums(
    gradients: GradientBuffer, names: Sequence[str], tp: Axis, exact: ExactMode | None
) -> SquareSums | ExactSquareSums:
    """Return what adds the squares of a gradient buffer's shard."""
    device = gradients.shard.device
    if exact is not None:
        return ExactSquareSums(gradients.shard_layout, names, device)
    return SquareSums(gradients.shard_layout, names, tp, device)


def build_optimizer(
    setup: Setup, gradients: GradientBuffer, stages: dict[int, Stage], kernel: str
) -> ShardedAdamW:
    """Return the optimizer of a gradient buffer's flat shard; stages wait for its transfers."""
    o, dp = setup.config.optimizer, gradients.dp
    optimizer = ShardedAdamW(
        gradients.shard_layout,
        gradients.shard.device,
        Hyperparameters(o.betas, o.eps, o.weight_decay),
        kernel,
        setup.config.parallel.bucket_bytes,
    )

    # Each layer waits for its own weights at their first use in the next step.
    if dp.size > 1 and dp.overlap:
        for module in stages.values():
            module.first_use = optimizer.wait_for
    return optimizer


def forward_only(
    programs: Sequence[Program], num_microbatches: int, layout: Layout
) -> tuple[Program, ...]:
    """The forwards of the first micro-batches, in the order of the schedule."""
    forwards = tuple(
        tuple(a for a in program if a.op is Op.FORWARD and a.microbatch < num_microbatches)
        for program in programs
    )
    return insert_transfers(forwards, layout)
