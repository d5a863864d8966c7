"""Training engine: one model on one process grid, and one optimizer step.

- Builds the pipeline stages, the executor, the gradient buffer and the optimizer of this rank.
- Reads and writes no files, so tests and tools can run steps of any layout directly.
- A step takes micro-batches of token ids and a learning rate. With `data.cross_documents: block`
  it also takes the document index of each token.
- Every rank decides whether to apply or skip a step from the same sums, so all decide alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from k2train.config.load import Config
from k2train.model.initialize import attach_rotary, initialize, materialize
from k2train.model.kernels.select import DeviceTraits, Kernels, choose_kernels
from k2train.model.transformer import Architecture, Stage, activation_shape
from k2train.optim.adamw import ShardedAdamW
from k2train.optim.grad_norm import SquareSums, StepDecision, decide_step
from k2train.parallel.comm_tracker import wait_scope
from k2train.parallel.grad_buffer import GradientBuffer
from k2train.parallel.grid import Axis, ProcessGrid
from k2train.parallel.pipeline import Executor
from k2train.plan.schedule import Action, Op, build_programs, insert_transfers, placement_of
from k2train.train.fault_values import (
    inject_gradient_fault,
    inject_output_fault,
    inject_state_fault,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class StepResult:
    """Result of one training step; equal on every rank."""

    loss: float
    grad_norm: float
    norms: Mapping[str, float]
    applied: bool
    """False when a loss or gradient was not finite: nothing was changed on any rank."""
    flags: tuple[float, ...]


def architecture_of(config: Config) -> Architecture:
    """Return the `Architecture` of a config's model section."""
    m = config.model
    assert m.num_kv_heads is not None, "the config resolves num_kv_heads"
    return Architecture(
        m.num_layers,
        m.hidden_size,
        m.ffn_hidden_size,
        m.num_heads,
        m.num_kv_heads,
        m.vocab_size,
        m.rope_theta,
        m.norm_eps,
        m.init_std,
    )


def kernels_of(config: Config, device: torch.device | None = None) -> Kernels:
    """Return the kernels of a config, resolved for a device (None: a CPU)."""
    k, m = config.kernels, config.model
    return choose_kernels(
        attention=k.attention,
        norm=k.norm,
        elementwise=k.elementwise,
        loss=k.loss,
        matmul=k.matmul,
        optimizer=k.optimizer,
        compile=k.compile,
        recompute=k.recompute,
        recompute_layers=k.recompute_layers,
        traits=DeviceTraits(
            device=device or torch.device("cpu"),
            dtype=DTYPES[config.precision],
            sequence_length=config.data.sequence_length,
            head_dim=m.hidden_size // m.num_heads,
            block=config.data.cross_documents == "block",
        ),
    )


def axes_of(config: Config, grid: ProcessGrid) -> tuple[Axis, Axis]:
    """Return this rank's (tensor-parallel, data-parallel) axes with the configured communication.

    `auto` turns overlap and the second gather on for accelerators only. With gloo a collective
    takes the core that would compute meanwhile, and a second gather costs more than it saves.
    """
    p, accelerator = config.parallel, grid.device.type != "cpu"
    overlap = p.overlap == "on" or (p.overlap == "auto" and accelerator)
    regather = p.gathered == "again" or (p.gathered == "auto" and accelerator)
    tp = replace(grid.tp, overlap=overlap, regather=regather, symmetric=p.symmetric_memory)
    return tp, replace(grid.dp, overlap=overlap)


class StageWithDocuments:
    """Adapter that passes a stage the document indices of its next micro-batch.

    The executor passes a stage only its input. Every rank already has the documents, so no
    transfer needs to carry them. The program fixes the order of a stage's micro-batches.
    """

    def __init__(self, stage: Stage):
        self.stage = stage
        self.documents: Iterator[Tensor | None] = repeat(None)

    def __call__(self, x: Tensor) -> Tensor:
        return self.stage(x, next(self.documents))


class Engine:
    """Model and optimizer of one rank, with initial weights drawn from `run.seed`."""

    def __init__(self, config: Config, grid: ProcessGrid, fill: bool = True):
        """Build stages, buffers and optimizer.

        `fill=False` leaves all weights zero, for a checkpoint to overwrite.
        """
        self.config, self.grid = config, grid
        self.on_phase: Callable[[str], None] = lambda phase: None
        """Called when a step enters a phase: `forward`, `reduce` or `update`."""
        self.architecture, self.kernels = architecture_of(config), kernels_of(config, grid.device)
        self.names = self.architecture.tensor_names()
        self.dtype = DTYPES[config.precision]
        layout, batch = grid.layout, config.batch
        assert layout.placement == placement_of(config.parallel.schedule), (
            "the layout is of another schedule"
        )

        self.tp, self.dp = axes_of(config, grid)
        self.sequence = bool(config.parallel.sequence) and grid.tp.size > 1
        self.num_microbatches = batch.global_sequences // (grid.dp.size * batch.micro_sequences)
        self.targets = batch.global_sequences * (config.data.sequence_length - 1)
        """Positions with a label in a global batch. Divides the loss once, before backward."""

        self.stages = {
            stage: self._build_stage(stage) for stage in layout.stages_of(grid.coordinate.pp)
        }
        attach_rotary(
            list(self.stages.values()), self.architecture, config.data.sequence_length, grid.device
        )

        self.gradients = GradientBuffer(
            list(self.stages.values()),
            self.dp,
            self.tp,
            grid.device,
            self.num_microbatches,
            config.parallel.bucket_bytes,
        )
        self.square_sums = SquareSums(self.gradients.shard_layout, self.names, grid.tp, grid.device)

        o = config.optimizer
        self.optimizer = ShardedAdamW(
            self.gradients.shard_layout,
            grid.device,
            (o.betas[0], o.betas[1]),
            o.eps,
            o.weight_decay,
            self.kernels.optimizer,
            config.parallel.bucket_bytes,
        )

        # Each layer waits for its own weights at their first use in the next step.
        if self.dp.size > 1 and self.dp.overlap:
            for module in self.stages.values():
                module.first_use = self.optimizer.wait_for

        if fill:
            initialize(list(self.stages.values()), config.run.seed, self.optimizer.set_master)

        programs = build_programs(
            config.parallel.schedule,
            layout.pipeline,
            self.num_microbatches,
            config.parallel.stages_per_rank,
        )
        self.program = programs[grid.coordinate.pp]
        # Evaluation runs the forwards of the same schedule, with transfers of their own.
        self.forward_program = self._forward_only(programs)[grid.coordinate.pp]
        self.stage_calls = {
            stage: StageWithDocuments(module) for stage, module in self.stages.items()
        }
        work = {stage: module.weight_grad_store for stage, module in self.stages.items()}

        self.executor = Executor(self.stage_calls, layout.num_stages, grid.pp, grid.device, work)

        self.shape = activation_shape(
            self.architecture,
            config.data.sequence_length,
            batch.micro_sequences,
            grid.tp,
            self.sequence,
        )

    @property
    def block(self) -> bool:
        """Whether attention stops at document boundaries."""
        return self.config.data.cross_documents == "block"

    @property
    def needs_batch(self) -> bool:
        """Whether this rank reads the batch.

        The first and the last stage read tokens; with blocked attention every stage reads the
        documents.
        """
        return self.block or 0 in self.stages or self.grid.layout.num_stages - 1 in self.stages

    def train_step(
        self,
        microbatches: Sequence[Tensor],
        lr: float,
        flags: Sequence[float] = (),
        documents: Sequence[Tensor] | None = None,
    ) -> StepResult:
        """Run one optimizer step over this rank's micro-batches; collective.

        Each micro-batch holds token ids [micro_sequences, sequence_length]. `documents` has the
        same shapes: the index of each token's document in its row. It is None unless
        `data.cross_documents` is `block`. `flags` are summed over all ranks in the step's
        exchange. A loss or gradient that is not finite changes nothing on any rank.
        """
        self.on_phase("forward")
        inject_state_fault(self.optimizer)
        self.gradients.zero()
        loss = self._run(self.program, microbatches, documents)

        self.on_phase("reduce")
        inject_gradient_fault(self.gradients.shard_layout)
        flat_gradient = self.gradients.reduce()
        decision = self._decide(self.square_sums(flat_gradient), loss, flags)

        self.on_phase("update")
        self.optimizer.step(flat_gradient, lr, decision.divisor, decision.skip)

        # The only point where the host waits for the device: the whole step is queued by now.
        with wait_scope(self.grid.comm, "the device"):
            agreed = decision.read()

        self.optimizer.count(agreed.finite)
        return StepResult(agreed.loss, agreed.grad_norm, agreed.norms, agreed.finite, agreed.flags)

    def evaluate(
        self, microbatches: Sequence[Tensor], documents: Sequence[Tensor] | None = None
    ) -> float:
        """Return the mean loss of one global batch (nats per target) without gradients; collective.

        `documents` as in `train_step`. Changes no state.
        """
        loss = self._run(self.forward_program, microbatches, documents)
        # There are no gradients; the exchange still shares the loss with all ranks.
        no_squares = torch.zeros(len(self.names), dtype=torch.float64, device=self.grid.device)
        return self._decide(no_squares, loss, ()).read().loss

    def _run(
        self,
        program: Sequence[Action],
        microbatches: Sequence[Tensor],
        documents: Sequence[Tensor] | None,
    ) -> Tensor:
        """Return this rank's part of the mean loss: 0 where another rank counts it."""
        last = self.stages.get(self.grid.layout.num_stages - 1)
        for items, needed in ((microbatches, self.needs_batch), (documents or (), self.block)):
            assert not needed or len(items) == self.num_microbatches, (
                f"{len(items)} micro-batches, planned {self.num_microbatches}"
            )
        assert self.block or documents is None, (
            "documents were given, but data.cross_documents is attend"
        )

        # Each stage takes its documents in the order of its forwards in the program.
        for stage, call in self.stage_calls.items():
            order = [a.microbatch for a in program if a.op is Op.FORWARD and a.stage == stage]
            call.documents = (
                repeat(None) if documents is None else iter([documents[m] for m in order])
            )

        def scaled_loss(hidden: Tensor, microbatch: int) -> Tensor:
            assert last is not None, "only the last stage has a loss"
            return last.loss(
                inject_output_fault(hidden), microbatches[microbatch], 1.0 / self.targets
            )

        losses = self.executor.run(
            program, lambda m: microbatches[m], scaled_loss, self.shape, self.dtype
        )
        if not losses:
            return torch.zeros((), device=self.grid.device)

        # Multiplied by 0, not left out: a copy that is not finite on another tensor-parallel
        # rank must stop the step too.
        return torch.stack(losses).sum() * float(self.grid.tp.rank == 0)

    def _decide(self, sums: Tensor, loss: Tensor, flags: Sequence[float]) -> StepDecision:
        clip_norm = self.config.optimizer.clip_norm
        return decide_step(sums, self.names, loss, flags, self.grid.stage, self.grid.pp, clip_norm)

    def _build_stage(self, stage: int) -> Stage:
        layers = self.grid.layout.layers_of(stage, self.architecture.num_layers)
        first, last = stage == 0, stage == self.grid.layout.num_stages - 1
        module = materialize(
            lambda: Stage(
                self.architecture, layers, first, last, self.tp, self.sequence, self.kernels
            ),
            self.dtype,
            self.grid.device,
        )
        assert isinstance(module, Stage), "a stage was built"
        return module

    def _forward_only(self, programs: Sequence[Sequence[Action]]) -> tuple[tuple[Action, ...], ...]:
        forwards = tuple(tuple(a for a in program if a.op is Op.FORWARD) for program in programs)
        return insert_transfers(forwards, self.grid.layout)
