"""Setup: what a config means on a number of processes, decided in one place.

- Layout, schedule, model shape, work of a micro-batch, memory, and what `auto` stands for.
- Preflight, engine, plan tool and benches all take it from here, so a plan cannot show another
  layout, schedule or memory than the run has.
- Needs no torch. What depends on the device takes its type: the engine resolves axes and kernels.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Self

from k2train.config.load import Config, check_world
from k2train.model.architecture import Architecture
from k2train.optim.lr_schedule import rate
from k2train.plan.activations import FP32, ActivationSpec
from k2train.plan.cost import rank_parameters
from k2train.plan.layout import Layout
from k2train.plan.memory import RankMemory, rank_memory
from k2train.plan.pipeline_choice import AUTO, Asked, PipelineChoice, PipelineWork, choose_pipeline
from k2train.plan.schedule import Program, build_programs, placement_of
from k2train.plan.sum_tree import most_sums, nodes_of
from k2train.plan.transfer_memory import machine_bytes, rank_bytes


def architecture_of(config: Config) -> Architecture:
    """Return the `Architecture` of a config's model section."""
    return Architecture.of(config)


def with_pipeline(config: Config, choice: PipelineChoice) -> Config:
    """Return the config with a schedule, its stages on a rank, and its cut."""
    chosen = config.parallel.model_copy(update=asdict(choice))
    return config.model_copy(update={"parallel": chosen})


def _layout_of(config: Config, world_size: int) -> Layout:
    """Layout of a config whose schedule and cut are chosen."""
    p = config.parallel
    assert not isinstance(p.layers_per_stage, str), "the cut is chosen before the layout"
    return Layout.for_world(
        world_size,
        p.tensor,
        p.pipeline,
        p.stages_per_rank,
        placement_of(p.schedule),
        p.layers_per_stage,
    )


@dataclass(frozen=True)
class Setup:
    """A config and its layout, with all that follows from the two."""

    config: Config
    """With the schedule and the cut that `auto` stands for."""
    layout: Layout
    pipeline_reason: str = ""
    """Why `auto` means this schedule and this cut; "" where the config said both."""

    @classmethod
    def of(cls, config: Config, world_size: int) -> Self:
        """Return the setup on `world_size` processes.

        Raises ConfigError when processes, batch, layout and schedule do not fit.
        """
        check_world(config, world_size)
        setup = cls._chosen(config, world_size)
        # Built now: a schedule that cannot run with these micro-batches is a mistake of the config.
        assert len(setup.programs) == setup.layout.pipeline, "one program for each pipeline rank"
        return setup

    @classmethod
    def _chosen(cls, config: Config, world_size: int) -> Self:
        """Return the setup with a schedule and a cut in place of `auto`."""
        p = config.parallel
        if AUTO not in (p.schedule, p.layers_per_stage):
            return cls(config, _layout_of(config, world_size))

        asked = Asked(p.schedule, p.stages_per_rank, p.layers_per_stage)
        work = PipelineWork(
            architecture_of(config),
            config.data.sequence_length,
            p.pipeline,
            config.batch.global_sequences
            // (world_size // (p.tensor * p.pipeline) * config.batch.micro_sequences),
            config.kernels.loss != "reference",
            config.batch.micro_sequences * config.data.sequence_length // p.tensor,
        )

        def most_bytes(choice: PipelineChoice) -> int:
            chosen = with_pipeline(config, choice)
            return cls(chosen, _layout_of(chosen, world_size)).most_memory_bytes

        choice, reason = choose_pipeline(work, asked, most_bytes)
        chosen = with_pipeline(config, choice)
        return cls(chosen, _layout_of(chosen, world_size), reason)

    @property
    def most_memory_bytes(self) -> int:
        """Planned bytes of the rank that needs most, on an accelerator."""
        work = self.work()
        return max(self.memory(work, pp).total_bytes for pp in range(self.layout.pipeline))

    @cached_property
    def architecture(self) -> Architecture:
        """Sizes and constants of the model."""
        return architecture_of(self.config)

    @cached_property
    def num_microbatches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        batch = self.config.batch
        return batch.global_sequences // (self.layout.data * batch.micro_sequences)

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """The schedule: what each pipeline rank does in a step. Raises ConfigError."""
        p = self.config.parallel
        return build_programs(p.schedule, p.pipeline, self.num_microbatches, p.stages_per_rank)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.config.batch.global_sequences * self.config.data.sequence_length

    @property
    def targets(self) -> int:
        """Positions of a global batch that have a label: all but the last of each sequence."""
        return self.step_tokens - self.config.batch.global_sequences

    @property
    def precision(self) -> str:
        """Precision to plan with: before `auto` is decided, that of an accelerator."""
        return "bf16" if self.config.precision == "auto" else self.config.precision

    @property
    def block(self) -> bool:
        """Whether attention stops at document boundaries."""
        return self.config.data.cross_documents == "block"

    @property
    def sequence(self) -> bool:
        """Whether activations between layers are split along the sequence."""
        return bool(self.config.parallel.sequence) and self.layout.tensor > 1

    def overlap(self, device_type: str) -> bool:
        """Whether collectives run beside the computation on a device type.

        `auto` turns it on for accelerators only: with gloo a collective takes the core that would
        compute meanwhile.
        """
        overlap = self.config.parallel.overlap
        return overlap == "on" or (overlap == "auto" and device_type != "cpu")

    def regather(self, device_type: str) -> bool:
        """Whether the backward gathers a sequence again instead of keeping it.

        `auto` turns it on for accelerators only: with gloo the second gather costs more than it
        saves.
        """
        gathered = self.config.parallel.gathered
        return gathered == "again" or (gathered == "auto" and device_type != "cpu")

    def shared_bytes(self, device_type: str, ranks: Collection[int] | None = None) -> int:
        """Return host bytes that `ranks` of one machine share; None: that one rank maps at most."""
        if device_type != "cpu" or self.config.parallel.shared_memory == "off":
            return 0
        waits = not self.overlap(device_type)
        if ranks is None:
            return rank_bytes(self.layout, waits)
        return machine_bytes(self.layout, ranks, waits)

    def learning_rate(self, step: int, total_steps: int) -> float:
        """Return the learning rate used in `step` (from 1) of this stage."""
        lr = self.config.lr
        return rate(step, lr.kind, lr.peak, lr.final, lr.warmup_steps, total_steps, lr.decay_steps)

    def work(
        self,
        device_type: str = "cuda",
        attention: str | None = None,
        matmul: str = "torch",
        loss: str | None = None,
    ) -> ActivationSpec:
        """Return the work of one micro-batch on a device type.

        `attention`, `matmul` and `loss` are the kernels in use, if known.
        """
        config = self.config
        # Which one `auto` takes depends on the device: the one that needs more memory.
        loss = loss or ("triton" if config.kernels.loss == "triton" else "fused")
        auto = "flash" if config.kernels.attention == "auto" else config.kernels.attention
        return ActivationSpec(
            self.architecture,
            config.data.sequence_length,
            config.batch.micro_sequences,
            self.precision,
            tensor=self.layout.tensor,
            sequence=self.sequence,
            regather=self.regather(device_type),
            device=device_type,
            attention=attention or auto,
            matmul=matmul,
            loss=loss,
            block=self.block,
            recompute=config.kernels.recompute,
            recompute_layers=config.kernels.recompute_layers,
        )

    def leaves(self, rank: int) -> range:
        """Return the leaves of a data-parallel rank in the sum tree of `run.exact`."""
        batch = self.config.batch
        leaf = batch.exact_leaf or batch.exact_unit
        own = batch.global_sequences // self.layout.data // leaf
        return range(rank * own, (rank + 1) * own)

    def memory(self, work: ActivationSpec, pp: int) -> RankMemory:
        """Return the memory of one rank at pipeline rank `pp` with that work."""
        planned = self._plain_memory(work, pp)
        if not self.config.run.exact:
            return planned

        # The tree holds more gradients, and a transfer has several parts of a sum.
        ranks = [self.leaves(rank) for rank in range(self.layout.data)]
        count = rank_parameters(work.shape, self.layout, pp)
        more = FP32 * count * (max(map(most_sums, ranks)) - 1)
        parts = max(len(nodes_of(leaves)) for leaves in ranks)
        state = replace(planned.state, gradients_bytes=planned.state.gradients_bytes + more)
        return replace(planned, state=state, transfer_bytes=planned.transfer_bytes * parts)

    def _plain_memory(self, work: ActivationSpec, pp: int) -> RankMemory:
        return rank_memory(
            work,
            self.layout,
            self.programs[pp],
            pp,
            self.overlap(work.device),
            self.config.parallel.bucket_bytes,
        )
