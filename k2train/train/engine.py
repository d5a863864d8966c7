"""Training engine: one model on one process grid, and one optimizer step.

- Builds the pipeline stages, the executor, the gradient buffer and the optimizer of this rank.
- Reads and writes no files, so tests and tools can run steps of any layout directly.
- A step takes micro-batches and a learning rate. With `data.cross_documents: block` the
  micro-batches hold the document index of each token.
- With deterministic kernels on a GPU it computes in torch's strict mode.
- Every rank decides whether to apply or skip a step from the same sums, so all decide alike.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from k2train import fault_injection
from k2train.data.loader import MicroBatch
from k2train.fault_injection import VALUES
from k2train.launch.environment import cores_of_process
from k2train.model.architecture import Architecture
from k2train.model.initialize import attach_rotary, initialize, materialize
from k2train.model.transformer import Stage, activation_shape
from k2train.optim.adamw import Hyperparameters, ShardedAdamW
from k2train.optim.grad_norm import SquareSums, StepDecision, decide_step
from k2train.parallel.collectives import all_reduce
from k2train.parallel.comm_tracker import wait_scope
from k2train.parallel.grad_buffer import GradientBuffer
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.pipeline import Executor
from k2train.plan.layout import Layout
from k2train.plan.schedule import Op, Program, insert_transfers
from k2train.train.axes import axes_of, unconnected
from k2train.train.fault_values import (
    inject_gradient_fault,
    inject_output_fault,
    inject_state_fault,
)
from k2train.train.setup import Setup
from k2train.train.setup_kernels import DTYPES, kernels_of
from k2train.train.strict_mode import prepare_strict_mode, strict_mode

_OWN_LABELS = "with labels of their own the number of targets does not follow from the config"


@dataclass(frozen=True)
class StepResult:
    """Result of one training step; equal on every rank."""

    loss: float
    grad_norm: float
    norms: Mapping[str, float]
    applied: bool
    """False when loss or gradient were not finite or the gradient too large: no rank changed."""
    flags: tuple[float, ...]
    faults: tuple[str, ...] = ()
    """Value faults that some rank made on purpose in this step, by their name."""


class Engine:
    """Model and optimizer of one rank, with initial weights drawn from `run.seed`."""

    def __init__(self, setup: Setup, grid: ProcessGrid, fill: bool = True):
        """Build stages, buffers and optimizer.

        `fill=False` leaves all weights zero, for a checkpoint to overwrite.
        """
        assert setup.layout == grid.layout, "the grid is of another layout"
        self.setup, self.config, self.grid = setup, setup.config, grid
        self.on_phase: Callable[[str], None] = lambda phase: None
        """Called when a step enters a phase: `forward`, `reduce` or `update`."""
        self.strict = prepare_strict_mode(
            grid.device, setup.config.kernels.deterministic, grid.layout.world_size
        )
        self.architecture, self.kernels = setup.architecture, kernels_of(setup, grid.device)
        self.names = self.architecture.tensor_names()
        assert setup.config.precision != "auto", "the precision is decided before the engine"
        self.precision = setup.config.precision
        self.dtype = DTYPES[self.precision]
        self.unconnected = unconnected(setup, grid, self.kernels)
        """Why `parallel.symmetric_memory: auto` is off; "" where it is on, or was not asked."""
        self.tp, self.dp = axes_of(setup, grid, connected=not self.unconnected)

        self.stages = self._build_stages()
        modules = list(self.stages.values())
        self.gradients = GradientBuffer(
            modules,
            self.dp,
            self.tp,
            grid.device,
            setup.num_microbatches,
            setup.config.parallel.bucket_bytes,
        )
        self.square_sums = SquareSums(self.gradients.shard_layout, self.names, grid.tp, grid.device)
        self.optimizer = self._build_optimizer()
        if fill:
            # On accelerators most cores of a machine idle, whatever OMP_NUM_THREADS says.
            initialize(
                modules, setup.config.run.seed, self.optimizer.set_master, cores_of_process()
            )

        self.program = setup.programs[grid.coordinate.pp]
        self._forward_programs: dict[int, Program] = {}
        work = {stage: module.weight_grad_store for stage, module in self.stages.items()}
        self.executor = Executor(self.stages, grid.layout.num_stages, grid.pp, grid.device, work)
        self.shape = activation_shape(
            self.architecture,
            setup.config.data.sequence_length,
            setup.config.batch.micro_sequences,
            self.tp,
        )

    @property
    def needs_batch(self) -> bool:
        """Whether this rank reads the batch.

        The first and the last stage read tokens; with blocked attention every stage reads the
        documents.
        """
        ends = (0, self.grid.layout.num_stages - 1)
        return self.setup.block or any(stage in self.stages for stage in ends)

    def train_step(
        self,
        batch: Sequence[MicroBatch],
        lr: float,
        flags: Sequence[float] = (),
        targets: int | None = None,
    ) -> StepResult:
        """Run one optimizer step over this rank's micro-batches; collective.

        `flags` are summed over all ranks in the step's exchange. `targets` is the number of labels
        in the global batch, required where micro-batches have labels of their own. A loss or
        gradient that is not finite, or too large for fp32 moments, changes nothing on any rank.
        """
        with strict_mode(self.strict):
            return self._train_step(batch, lr, flags, targets)

    def _train_step(
        self,
        batch: Sequence[MicroBatch],
        lr: float,
        flags: Sequence[float],
        targets: int | None,
    ) -> StepResult:
        self.on_phase("forward")
        inject_state_fault(self.optimizer)
        inject_gradient_fault(self.gradients)
        self.gradients.zero()
        loss = self._run(self.program, batch, targets)

        self.on_phase("reduce")
        flat_gradient = self.gradients.reduce()
        decision = self._decide(
            self.square_sums(flat_gradient), loss, (*flags, *fault_injection.take_changed())
        )

        self.on_phase("update")
        self.optimizer.step(flat_gradient, lr, decision.divisor, decision.skip)

        # The only point where the host waits for the device: the whole step is queued by now.
        with wait_scope(self.grid.comm, "the device"):
            agreed = decision.read()

        self.optimizer.count(agreed.applied)
        shared, made = agreed.flags[: len(flags)], agreed.flags[len(flags) :]
        faults = tuple(name for name, count in zip(VALUES, made, strict=True) if count)
        return StepResult(
            agreed.loss, agreed.grad_norm, agreed.norms, agreed.applied, shared, faults
        )

    def evaluate(self, batch: Sequence[MicroBatch], targets: int | None = None) -> float:
        """Return the mean loss of one global batch (nats per target) without gradients; collective.

        `targets` as in `train_step`. Changes no state.
        """
        assert targets is not None or all(part.labels is None for part in batch), _OWN_LABELS
        losses = self.row_losses(batch, self.setup.num_microbatches)
        return math.fsum(losses.tolist()) / (targets or self.setup.targets)

    def row_losses(self, batch: Sequence[MicroBatch], num_microbatches: int) -> Tensor:
        """Return the summed loss of each row, fp64 [rows] in host memory, without gradients.

        Rows are those of all data-parallel ranks in their order, `num_microbatches` from each of
        them, which are at most those of a step. Equal on every rank; collective. Changes no state.
        """
        self._check_batch(batch, num_microbatches)
        last = self.stages.get(self.grid.layout.num_stages - 1)

        def loss(hidden: Tensor, microbatch: int) -> Tensor:
            assert last is not None, "only the last stage has a loss"
            return last.row_losses(inject_output_fault(hidden), batch[microbatch].targets)

        found = self.forward(self.forward_program(num_microbatches), batch, loss)
        share = num_microbatches * self.config.batch.micro_sequences
        rows = torch.zeros(self.grid.dp.size, share, dtype=torch.float64, device=self.grid.device)
        if found:
            # Multiplied by 0, not left out: see `_run`.
            rows[self.grid.dp.rank] = torch.cat(found) * float(self.grid.tp.rank == 0)

        # Every row is of one rank, and the others add exact zeros: no layout changes a bit of it.
        all_reduce(rows, self.grid.stage)
        all_reduce(rows, self.grid.pp)
        with wait_scope(self.grid.comm, "the device"):
            return rows.flatten().cpu()

    def forward_program(self, num_microbatches: int) -> Program:
        """Return this rank's program of the schedule's first forwards, with their transfers."""
        found = self._forward_programs.get(num_microbatches)
        if found is None:
            setup, pp = self.setup, self.grid.coordinate.pp
            programs = _forward_only(setup.programs, num_microbatches, self.grid.layout)
            found = self._forward_programs[num_microbatches] = programs[pp]
        return found

    def forward(
        self,
        program: Program,
        batch: Sequence[MicroBatch],
        loss: Callable[[Tensor, int], Tensor],
    ) -> list[Tensor]:
        """Run a program over micro-batches; collective.

        `loss(output, microbatch)` takes the last stage's output. Returns its results, in order, on
        the rank with the last stage.
        """

        def stage(number: int, x: Tensor, microbatch: int) -> Tensor:
            output: Tensor = self.stages[number](
                x, batch[microbatch].documents if self.setup.block else None
            )
            return output

        with strict_mode(self.strict):
            return self.executor.run(
                program, lambda m: batch[m].tokens, loss, self.shape, self.dtype, stage
            )

    def _run(self, program: Program, batch: Sequence[MicroBatch], targets: int | None) -> Tensor:
        """Return this rank's part of the mean loss: 0 where another rank counts it."""
        self._check_batch(batch, self.setup.num_microbatches)
        assert targets is not None or all(part.labels is None for part in batch), _OWN_LABELS
        last = self.stages.get(self.grid.layout.num_stages - 1)
        scale = 1.0 / (targets or self.setup.targets)

        def scaled_loss(hidden: Tensor, microbatch: int) -> Tensor:
            assert last is not None, "only the last stage has a loss"
            # The mean is taken here, once, before the backward.
            return last.loss(inject_output_fault(hidden), batch[microbatch].targets, scale)

        losses = self.forward(program, batch, scaled_loss)
        if not losses:
            return torch.zeros((), device=self.grid.device)

        # Multiplied by 0, not left out: a copy that is not finite on another tensor-parallel
        # rank must stop the step too.
        return torch.stack(losses).sum() * float(self.grid.tp.rank == 0)

    def _check_batch(self, batch: Sequence[MicroBatch], num_microbatches: int) -> None:
        assert len(batch) == num_microbatches or not self.needs_batch, (
            f"{len(batch)} micro-batches, planned {num_microbatches}"
        )
        assert all((part.documents is not None) == self.setup.block for part in batch), (
            f"documents are {'missing' if self.setup.block else 'given'}, but "
            f"data.cross_documents is {self.config.data.cross_documents}"
        )

    def _decide(self, sums: Tensor, loss: Tensor, flags: Sequence[float]) -> StepDecision:
        clip_norm = self.config.optimizer.clip_norm
        return decide_step(sums, self.names, loss, flags, self.grid.stage, self.grid.pp, clip_norm)

    def _build_stages(self) -> dict[int, Stage]:
        layout = self.grid.layout
        stages = {stage: self._build_stage(stage) for stage in layout.stages_of(self.grid.pp.rank)}
        self._attach_rotary(stages, self.architecture)
        return stages

    @contextmanager
    def rope_theta(self, theta: float) -> Iterator[None]:
        """Compute with another base of the positions, within the context."""
        self._attach_rotary(self.stages, replace(self.architecture, rope_theta=theta))
        try:
            yield
        finally:
            self._attach_rotary(self.stages, self.architecture)

    def _attach_rotary(self, stages: Mapping[int, Stage], architecture: Architecture) -> None:
        length = self.config.data.sequence_length
        attach_rotary(list(stages.values()), architecture, length, self.grid.device)

    def _build_stage(self, stage: int) -> Stage:
        layers = self.grid.layout.layers_of(stage, self.architecture.num_layers)
        first, last = stage == 0, stage == self.grid.layout.num_stages - 1
        module = materialize(
            lambda: Stage(self.architecture, layers, first, last, self.tp, self.kernels),
            self.dtype,
            self.grid.device,
        )
        assert isinstance(module, Stage), "a stage was built"
        return module

    def _build_optimizer(self) -> ShardedAdamW:
        o = self.config.optimizer
        optimizer = ShardedAdamW(
            self.gradients.shard_layout,
            self.grid.device,
            Hyperparameters(o.betas, o.eps, o.weight_decay),
            self.kernels.optimizer,
            self.config.parallel.bucket_bytes,
        )

        # Each layer waits for its own weights at their first use in the next step.
        if self.dp.size > 1 and self.dp.overlap:
            for module in self.stages.values():
                module.first_use = optimizer.wait_for
        return optimizer


def _forward_only(
    programs: Sequence[Program], num_microbatches: int, layout: Layout
) -> tuple[Program, ...]:
    """The forwards of the first micro-batches, in the order of the schedule."""
    forwards = tuple(
        tuple(a for a in program if a.op is Op.FORWARD and a.microbatch < num_microbatches)
        for program in programs
    )
    return insert_transfers(forwards, layout)
