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
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from k2train import fault_injection
from k2train.data.loader import MicroBatch
from k2train.launch.environment import cores_of_process
from k2train.model.architecture import Architecture
from k2train.model.initialize import attach_rotary, initialize
from k2train.model.kernels.select import Kernels
from k2train.model.kernels.threads import one_thread
from k2train.model.transformer import Stage, activation_shape
from k2train.optim.grad_norm import StepDecision, StepSums, decide_step
from k2train.optim.update_norm import UpdateNorm
from k2train.parallel.collectives import all_reduce
from k2train.parallel.comm_tracker import wait_scope
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.pipeline import Executor
from k2train.plan.schedule import Action, Program
from k2train.train.axes import axes_of, unconnected
from k2train.train.engine_parts import (
    build_gradients,
    build_optimizer,
    build_stages,
    check_batch,
    documents_of,
    forward_only,
    square_sums,
)
from k2train.train.exact_mode import ExactMode
from k2train.train.fault_values import (
    inject_gradient_fault,
    inject_output_fault,
    inject_state_fault,
)
from k2train.train.recheck import Judged, StepJudge, StepPass, judge_step
from k2train.train.setup import Setup
from k2train.train.setup_kernels import DTYPES, kernels_of
from k2train.train.step_result import StepResult, result_of
from k2train.train.strict_mode import prepare_strict_mode, strict_mode

ActionHook = Callable[[Action], None]
_OWN_LABELS = "with labels of their own the number of targets does not follow from the config"


class Engine:
    """Model and optimizer of one rank, with initial weights drawn from `run.seed`."""

    def __init__(
        self,
        setup: Setup,
        grid: ProcessGrid,
        fill: bool = True,
        kernels: Kernels | None = None,
    ):
        """Build stages, buffers and optimizer.

        `fill=False` leaves all weights zero, for a checkpoint to overwrite. `kernels` None: those
        of the setup on the grid's device.
        """
        assert setup.layout == grid.layout, "the grid is of another layout"
        self.setup, self.config, self.grid = setup, setup.config, grid
        self.on_phase: Callable[[str], None] = lambda phase: None
        """Called when a step enters a phase: `forward`, `reduce` or `update`."""
        self.watch_actions: tuple[ActionHook | None, ActionHook | None] = (None, None)
        """Called after and before each action of a program, for a profile."""
        self.judge: StepJudge | None = None
        """Judges a step before its update; without one the host reads the decision behind it."""
        self.strict = prepare_strict_mode(
            grid.device, setup.config.kernels.deterministic, grid.layout.world_size
        )
        self.architecture = setup.architecture
        self.kernels = kernels or kernels_of(setup, grid.device)
        self.names = self.architecture.tensor_names()
        assert setup.config.precision != "auto", "the precision is decided before the engine"
        self.precision = setup.config.precision
        self.dtype = DTYPES[self.precision]
        self.unconnected = unconnected(setup, grid, self.kernels)
        """Why `parallel.symmetric_memory: auto` is off; "" where it is on, or was not asked."""
        self.tp, self.dp, self.pp = axes_of(setup, grid, connected=not self.unconnected)

        self.stages = build_stages(grid, self.architecture, self.tp, self.kernels, self.dtype)
        self._attach_rotary(self.stages, self.architecture)
        modules = list(self.stages.values())
        self.exact = ExactMode(setup, grid) if setup.config.run.exact else None
        self.gradients = build_gradients(setup, modules, self.dp, self.tp, grid.device, self.exact)
        self.square_sums = square_sums(self.gradients, self.names, grid.tp, self.exact)
        self.optimizer = build_optimizer(setup, self.gradients, self.stages, self.kernels.optimizer)
        asked = setup.config.spikes.update_norm
        self.update_norm = UpdateNorm(self.optimizer, self.square_sums, grid, asked)
        if fill:
            # On accelerators most cores of a machine idle, whatever OMP_NUM_THREADS says.
            initialize(
                modules, setup.config.run.seed, self.optimizer.set_master, cores_of_process()
            )

        self.program = setup.programs[grid.coordinate.pp]
        self._forward_programs: dict[int, Program] = {}
        work = {stage: module.weight_grad_store for stage, module in self.stages.items()}
        self.executor = Executor(self.stages, grid.layout.num_stages, self.pp, grid.device, work)
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
        in the global batch, if the micro-batches have some of their own and do not say how many
        (`row_targets`). A loss or
        gradient that is not finite, or too large for fp32 moments, changes nothing on any rank.
        """
        with strict_mode(self.strict), one_thread(self.exact is not None):
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
        told: list[StepSums] = []

        def compute() -> StepPass:
            if told:
                self.on_phase("forward")
            return self._gradient_pass(batch, flags, targets)

        def read(decision: StepDecision) -> StepSums:
            # The only point where the host waits for the device.
            with wait_scope(self.grid.comm, "the device"):
                told.append(decision.read())
            return told[-1]

        if self.judge is None:
            judged = self._update_and_read(compute(), lr, read)
        else:
            judged = judge_step(compute, read, self.gradients, self.grid, self.judge)
            self.on_phase("update")
            if judged.applies:
                decision = judged.step.decision
                self.optimizer.step(judged.step.gradient, lr, decision.divisor, decision.skip)

        self.optimizer.count(judged.applies)
        update = self.update_norm(judged.step.gradient, lr, judged.applies)
        return result_of(judged, told, len(flags), update)

    def _gradient_pass(
        self, batch: Sequence[MicroBatch], flags: Sequence[float], targets: int | None
    ) -> StepPass:
        """Compute gradients and decide about the step, which changes no state; collective."""
        inject_gradient_fault(self.gradients)
        self.gradients.zero()
        loss = self._run(self.program, batch, targets)

        self.on_phase("reduce")
        gradient = self.gradients.reduce()
        shared = (*flags, *fault_injection.take_changed())
        return StepPass(gradient, self._decide(self.square_sums(gradient), loss, shared), loss)

    def _update_and_read(
        self, step: StepPass, lr: float, read: Callable[[StepDecision], StepSums]
    ) -> Judged:
        """Queue the update before the host waits, so that the device does not idle."""
        self.on_phase("update")
        self.optimizer.step(step.gradient, lr, step.decision.divisor, step.decision.skip)
        return Judged(step, read(step.decision))

    def compute_gradients(
        self, batch: Sequence[MicroBatch], targets: int | None = None
    ) -> StepPass:
        """Compute what a step would be decided from, and update nothing; collective.

        `targets` as in `train_step`. The gradient is this rank's shard, valid until the next step.
        """
        with strict_mode(self.strict), one_thread(self.exact is not None):
            return self._gradient_pass(batch, (), targets)

    def evaluate(self, batch: Sequence[MicroBatch], targets: int | None = None) -> float:
        """Return the mean loss of one global batch (nats per target) without gradients; collective.

        `targets` as in `train_step`. Changes no state.
        """
        count = self._count_targets(batch, targets)
        losses = self.row_losses(batch, self.setup.num_microbatches)
        return math.fsum(losses.tolist()) / count

    def row_losses(self, batch: Sequence[MicroBatch], num_microbatches: int) -> Tensor:
        """Return the summed loss of each row, fp64 [rows] in host memory, without gradients.

        Rows are those of all data-parallel ranks in their order, `num_microbatches` from each of
        them, which are at most those of a step. Equal on every rank; collective. Changes no state.
        """
        check_batch(self.setup, batch, num_microbatches, self.needs_batch)
        last = self.stages.get(self.grid.layout.num_stages - 1)

        def loss(hidden: Tensor, microbatch: int) -> Tensor:
            assert last is not None, "only the last stage has a loss"
            hidden, labels = inject_output_fault(hidden), batch[microbatch].targets
            if self.exact is not None:
                return self.exact.row_losses(last.row_losses, hidden, labels)
            return last.row_losses(hidden, labels)

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
            programs = forward_only(setup.programs, num_microbatches, self.grid.layout)
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
            documents = documents_of(batch[microbatch]) if self.setup.block else None
            if self.exact is not None:
                return self.exact.run_stage(self.stages[number], x, documents)
            output: Tensor = self.stages[number](x, documents)
            return output

        with strict_mode(self.strict), one_thread(self.exact is not None):
            return self.executor.run(
                program,
                lambda m: batch[m].tokens,
                loss,
                self.shape,
                self.dtype,
                stage,
                *self.watch_actions,
            )

    def _run(self, program: Program, batch: Sequence[MicroBatch], targets: int | None) -> Tensor:
        """Return this rank's part of the mean loss: 0 where another rank counts it.

        With `run.exact` that of each unit.
        """
        check_batch(self.setup, batch, self.setup.num_microbatches, self.needs_batch)
        last = self.stages.get(self.grid.layout.num_stages - 1)
        scale = 1.0 / self._count_targets(batch, targets)

        def scaled_loss(hidden: Tensor, microbatch: int) -> Tensor:
            assert last is not None, "only the last stage has a loss"
            hidden, labels = inject_output_fault(hidden), batch[microbatch].targets
            # The mean is taken here, once, before the backward.
            if self.exact is not None:
                return self.exact.loss(partial(last.loss, scale=scale), hidden, labels)
            return last.loss(hidden, labels, scale)

        losses = self.forward(program, batch, scaled_loss)
        if self.exact is not None:
            return self.exact.losses()
        if not losses:
            return torch.zeros((), device=self.grid.device)

        # Multiplied by 0, not left out: a copy that is not finite on another tensor-parallel
        # rank must stop the step too.
        return torch.stack(losses).sum() * float(self.grid.tp.rank == 0)

    def _count_targets(self, batch: Sequence[MicroBatch], given: int | None) -> int:
        """Labels of the whole global batch: as given, as the batch says, or all there can be."""
        told = batch[0].row_targets if batch else None
        if given is not None or told is not None:
            return sum(told or ()) if given is None else given
        assert all(part.labels is None for part in batch), _OWN_LABELS
        return self.setup.targets

    def _decide(self, sums: Tensor, loss: Tensor, flags: Sequence[float]) -> StepDecision:
        if self.exact is not None:
            return self.exact.decide(sums, self.names, loss, flags)
        clip_norm = self.config.optimizer.clip_norm
        return decide_step(sums, self.names, loss, flags, self.grid.stage, self.grid.pp, clip_norm)

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
