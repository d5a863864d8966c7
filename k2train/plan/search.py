"""Search over layouts: the legal ones of a model on a number of devices, ranked by step time.

- Every combination of tensor, pipeline, stages a rank, micro-batch and recompute policy is either a
  candidate or counted under the first rule that excludes it, with its numbers.
- Memory is that of this project's kernels (`plan.memory`), tensor by tensor.
- Candidates are ranked by predicted seconds. A lower bound without the bubble comes first: what
  cannot be among the best is never timed.

Alternatives considered:
- Timing all of them: the same order, and many times the wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from k2train.plan.action import Program
from k2train.plan.activations import ActivationSpec
from k2train.plan.cost import ModelShape
from k2train.plan.efficiency import constants_of
from k2train.plan.hardware import GIB, Cluster
from k2train.plan.layout import Layout
from k2train.plan.measured_time import time_of
from k2train.plan.memory import RankMemory, rank_memory
from k2train.plan.schedule import SCHEDULES
from k2train.plan.step_time import StepTime, stage_passes, step_time
from k2train.plan.workload import Workload

RECOMPUTE = ("none", "selective", "full")
MICRO = (1, 2, 3, 4, 6, 8, 12, 16)
STAGES = (1, 2, 4, 5, 8, 10)
RESERVE_BYTES = 3 * GIB
"""Device memory left to the driver, libraries, communicators and the allocator's losses."""


@dataclass(frozen=True)
class Choice:
    """The values that a search sets; data parallelism is what is left of the devices."""

    tensor: int
    pipeline: int
    stages_per_rank: int
    micro_sequences: int
    recompute: str

    @property
    def schedule(self) -> str:
        """Schedule for this number of stages."""
        return "interleaved" if self.stages_per_rank > 1 else "1f1b"

    def text(self) -> str:
        """Format as a user names it: `tensor=8,pipeline=4,...`."""
        return (
            f"tensor={self.tensor},pipeline={self.pipeline},stages={self.stages_per_rank},"
            f"micro={self.micro_sequences},recompute={self.recompute}"
        )


@dataclass(frozen=True)
class Space:
    """What a search holds fixed."""

    shape: ModelShape
    sequence_length: int
    global_sequences: int
    devices: int
    cluster: Cluster
    precision: str = "bf16"

    def workload(self, choice: Choice) -> Workload:
        """The step of a choice, as this project's kernels run it."""
        return Workload(
            self.shape,
            self.sequence_length,
            choice.micro_sequences,
            self.global_sequences,
            choice.tensor,
            choice.pipeline,
            choice.stages_per_rank,
            self.data(choice),
            sequence_parallel=choice.tensor > 1,
            recompute=choice.recompute,
            schedule=choice.schedule,
            precision=self.precision,
        )

    def data(self, choice: Choice) -> int:
        """Data-parallel ranks of a choice."""
        return self.devices // (choice.tensor * choice.pipeline)

    def microbatches(self, choice: Choice) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.global_sequences // (self.data(choice) * choice.micro_sequences)


@dataclass(frozen=True)
class Candidate:
    """A legal layout with its memory."""

    choice: Choice
    memory: RankMemory
    """Of the fullest pipeline rank."""
    bound_seconds: float
    """Seconds without bubble and traffic behind the pipeline."""


@dataclass(frozen=True)
class Ranked:
    """A candidate with its step."""

    candidate: Candidate
    step: StepTime

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step."""
        return self.step.seconds


@dataclass
class Found:
    """Result of a search."""

    space: Space
    candidates: list[Candidate] = field(default_factory=list)
    excluded: dict[str, list[tuple[Choice, str]]] = field(default_factory=dict)
    """By rule: choices and the numbers that exclude them."""

    def exclude(self, choice: Choice, rule: str, numbers: str) -> None:
        """Count a choice under a rule."""
        self.excluded.setdefault(rule, []).append((choice, numbers))

    @cached_property
    def nearest(self) -> tuple[Choice, str] | None:
        """The choice that needs least of those that do not fit, and its numbers."""
        return min(
            self.excluded.get("memory", []),
            key=lambda one: _memory_of(self.space, one[0]).total_bytes,
            default=None,
        )

    def best(self, count: int) -> list[Ranked]:
        """The fastest candidates, in order."""
        ranked: list[Ranked] = []
        for candidate in sorted(self.candidates, key=lambda one: one.bound_seconds):
            if len(ranked) == count and candidate.bound_seconds > ranked[-1].seconds:
                break
            work = self.space.workload(candidate.choice)
            ranked.append(Ranked(candidate, step_time(work, self.space.cluster)))
            ranked.sort(key=lambda one: one.seconds)
            del ranked[count:]
        return ranked


def search(space: Space) -> Found:
    """Find the legal layouts that fit, and count the others by rule."""
    found = Found(space)
    for choice in choices(space):
        broken = broken_rule(space, choice)
        if broken:
            found.exclude(choice, *broken)
            continue
        memory = _memory_of(space, choice)
        problem = memory_problem(space, memory)
        if problem:
            found.exclude(choice, "memory", problem)
        else:
            found.candidates.append(Candidate(choice, memory, _bound(space, choice)))
    return found


def choices(space: Space) -> Iterator[Choice]:
    """All combinations: degrees that divide the devices, usual micro-batches, every policy."""
    for tensor in _divisors(space.devices):
        if tensor > min(space.shape.num_heads, 2 * space.cluster.node):
            break
        for pipeline in _divisors(space.devices // tensor):
            if pipeline > space.shape.num_layers:
                break
            for stages in STAGES if pipeline > 1 else (1,):
                for micro in MICRO:
                    for policy in RECOMPUTE:
                        yield Choice(tensor, pipeline, stages, micro, policy)


def broken_rule(space: Space, choice: Choice) -> tuple[str, str] | None:
    """The first rule that a choice breaks, and its numbers; None for a legal one.

    The rules of a config (`k2train.config.rules`), and one of speed: tensor-parallel ranks share
    a node.
    """
    shape, t, p, v = space.shape, choice.tensor, choice.pipeline, choice.stages_per_rank
    for name in ("num_heads", "num_kv_heads", "ffn_hidden_size"):
        number = getattr(shape, name)
        if number % t:
            return f"tensor divides {name}", f"{number} by tensor={t}"
    if space.sequence_length % t:
        return "tensor divides sequence_length", f"{space.sequence_length} by tensor={t}"
    if t > space.cluster.node:
        return "tensor within a node", f"tensor={t} of {space.cluster.node} devices a node"
    if v > 1 and p == 1:
        return "interleaved: a pipeline of 2 or more", f"{v} stages a rank with pipeline=1"
    if shape.num_layers % (p * v):
        return "stages divide num_layers", f"{shape.num_layers} by {p} x {v} stages"
    data = space.data(choice)
    if space.global_sequences % (data * choice.micro_sequences):
        return (
            "data x micro divides the batch",
            f"{space.global_sequences} by {data} x {choice.micro_sequences}",
        )
    count = space.microbatches(choice)
    if v > 1 and count % p:
        return "interleaved: pipeline divides micro-batches", f"{count} by pipeline={p}"
    return None


def memory_problem(space: Space, memory: RankMemory) -> str | None:
    """Numbers of a choice that does not fit; None for one that does."""
    needed, there = memory.total_bytes + RESERVE_BYTES, space.cluster.device.memory_bytes
    if needed <= there:
        return None
    return f"{needed / GIB:.1f} GiB of {there / GIB:.1f} GiB"


def fits(space: Space, choice: Choice) -> bool:
    """Whether a choice is legal and fits the devices' memory."""
    if broken_rule(space, choice):
        return False
    return memory_problem(space, _memory_of(space, choice)) is None


def rank_of(space: Space, choice: Choice) -> Ranked:
    """One choice with its memory and its step, whether it fits or not."""
    candidate = Candidate(choice, _memory_of(space, choice), 0.0)
    return Ranked(candidate, step_time(space.workload(choice), space.cluster))


def terms_of(memory: RankMemory) -> Mapping[str, float]:
    """Bytes of a rank by kind; together its total."""
    state = memory.state
    running = memory.activations_bytes + memory.working_bytes
    return {
        "weights": state.weights_bytes,
        "gradients": state.gradients_bytes,
        "optimizer": state.optimizer_bytes,
        "activations": memory.activations_bytes,
        "working": memory.working_bytes,
        "transfers": max(0, memory.transfer_bytes - running),
    }


def _memory_of(space: Space, choice: Choice) -> RankMemory:
    """Memory of the fullest pipeline rank: the first has most in flight, the last the logits."""
    layout = Layout(choice.tensor, choice.pipeline, space.data(choice), choice.stages_per_rank)
    # In flight is most after the warm-up, which a few rounds show; transfers hold nothing here.
    count = min(space.microbatches(choice), 2 * choice.pipeline)
    programs = _compute_programs(choice.schedule, choice.pipeline, count, choice.stages_per_rank)
    work = ActivationSpec(
        space.shape,
        space.sequence_length,
        choice.micro_sequences,
        "fp32" if space.precision == "fp32" else "bf16",  # what is kept has no narrower form
        tensor=choice.tensor,
        sequence=choice.tensor > 1,
        regather=True,
        recompute=choice.recompute,
    )
    ends = {0, choice.pipeline - 1}
    memories = [rank_memory(work, layout, programs[pp], pp, True) for pp in ends]
    return max(memories, key=lambda memory: memory.total_bytes)


@lru_cache(maxsize=256)
def _compute_programs(
    kind: str, pipeline: int, num_microbatches: int, stages_per_rank: int
) -> dict[int, Program]:
    """Programs of the first and of the last pipeline rank, without transfers."""
    programs = SCHEDULES[kind](pipeline, num_microbatches, stages_per_rank)
    return {pp: programs[pp] for pp in (0, pipeline - 1)}


def _bound(space: Space, choice: Choice) -> float:
    """Seconds that no schedule can fall below: a rank's own passes, and the way to it and back."""
    work = space.workload(choice)
    constants = constants_of(space.cluster.device.generation)
    passes = stage_passes(work, time_of(work, space.cluster, constants))
    each = [one.forward.seconds + one.backward.seconds for one in passes]

    def bound(pp: int) -> float:
        busy = sum(each[stage] for stage in work.layout.stages_of(pp))
        # Its first micro-batch comes through all stages before, and goes back through them.
        return work.num_microbatches * busy + sum(each[:pp])

    return max(bound(pp) for pp in range(choice.pipeline))


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
