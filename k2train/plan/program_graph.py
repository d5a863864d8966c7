"""Programs as a graph of durations: the same times as `simulate`, many times faster.

- Built once for each schedule and size: every compute action and transfer, in an order in which
  inputs come first, with the indices of what it waits for.
- A time is then one pass over plain lists. A search asks for hundreds of layouts.
- A test compares it with `simulate`, span by span, for every schedule.

Alternatives considered:
- Formulas for the bubble: uneven stages and transfers have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from k2train.plan.action import (
    Action,
    Op,
    Program,
    ScheduleError,
    counterpart,
    dependencies,
    result,
)
from k2train.plan.schedule import SCHEDULES, insert_transfers, pipeline_layout

Kind = tuple[int, Op]


@dataclass(frozen=True)
class ProgramGraph:
    """Actions of all pipeline ranks of a step, each after what it waits for."""

    kinds: tuple[Kind, ...]
    """(stage, operation) that occur; a duration belongs to each."""
    nodes: tuple[tuple[int, tuple[int, ...]], ...]
    """Of each action: the index of its kind, and of the actions that it waits for."""
    ranks: tuple[tuple[int, int], ...]
    """Of each pipeline rank: its first and its last compute action."""

    def ends(self, seconds: Callable[[int, Op], float]) -> tuple[list[float], list[float]]:
        """(end, duration) of every action, seconds, from the duration of each kind."""
        durations = [seconds(stage, op) for stage, op in self.kinds]
        ends: list[float] = []
        own = []
        for kind, needs in self.nodes:
            start = 0.0
            for need in needs:
                if ends[need] > start:
                    start = ends[need]
            own.append(durations[kind])
            ends.append(start + durations[kind])
        return ends, own

    def seconds(self, seconds: Callable[[int, Op], float], without_barrier: bool = False) -> float:
        """Seconds of a step: from the first start to the last end.

        `without_barrier`: the longest time of a single rank. Ranks that begin a step while others
        still end the one before it need no more (Qi et al. 2023, section 4).
        """
        ends, own = self.ends(seconds)
        if not without_barrier:
            return max(ends[last] for _, last in self.ranks)
        return max(ends[last] - ends[first] + own[first] for first, last in self.ranks)


@lru_cache(maxsize=256)
def programs_of(
    kind: str, pipeline: int, num_microbatches: int, stages_per_rank: int
) -> tuple[Program, ...]:
    """Complete programs of all pipeline ranks, kept. Raises ScheduleError as `build_programs`.

    Not checked again: every schedule is, over many sizes, in tests and whenever a run starts.
    """
    if kind not in SCHEDULES:
        raise ScheduleError(f"schedule ({kind}) must be one of: {', '.join(SCHEDULES)}")
    programs = SCHEDULES[kind](pipeline, num_microbatches, stages_per_rank)
    return insert_transfers(programs, pipeline_layout(kind, pipeline, stages_per_rank))


@lru_cache(maxsize=256)
def program_graph(
    kind: str, pipeline: int, num_microbatches: int, stages_per_rank: int
) -> ProgramGraph:
    """Graph of a schedule's programs, kept. Raises ScheduleError as `programs_of`."""
    return graph_of(programs_of(kind, pipeline, num_microbatches, stages_per_rank))


def graph_of(programs: Sequence[Program]) -> ProgramGraph:
    """Graph of complete programs, transfers included."""
    builder = _Builder(programs)
    moved = True
    while moved:
        moved = False
        for rank in range(len(programs)):
            while builder.advance(rank):
                moved = True
    assert builder.done, "programs that were checked reach their ends"
    ranks = tuple((first, last) for first, last in builder.extents if first >= 0)
    return ProgramGraph(tuple(builder.kinds), tuple(builder.nodes), ranks)


class _Builder:
    """Walks all programs as the simulator does, and notes who waits for whom."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = programs
        self.num_stages = 1 + max(action.stage for program in programs for action in program)
        self.positions = [0] * len(programs)
        self.kinds: dict[Kind, int] = {}
        self.nodes: list[tuple[int, tuple[int, ...]]] = []
        self.extents = [(-1, -1) for _ in programs]

        self._results: dict[Action, tuple[int, int]] = {}
        self._arrivals: dict[tuple[int, Action], int] = {}
        self._issued: dict[tuple[int, Action], int] = {}
        self._links: dict[tuple[int, int], int] = {}

    @property
    def done(self) -> bool:
        """Whether every program is at its end."""
        return self.positions == [len(program) for program in self.programs]

    def advance(self, rank: int) -> bool:
        """Take the next action of a rank, if what it needs has a node."""
        program, position = self.programs[rank], self.positions[rank]
        if position == len(program):
            return False
        action = program[position]
        if action.op.is_compute:
            if not self._compute(rank, action):
                return False
        else:
            self._transfer(rank, action)
        self.positions[rank] += 1
        return True

    def _compute(self, rank: int, action: Action) -> bool:
        before = self.extents[rank][1]
        needs = [before] if before >= 0 else []
        for need in dependencies(action, self.num_stages):
            if need not in self._results:
                return False
            producer, node = self._results[need]
            if producer == rank:
                needs.append(node)
            elif (rank, need) in self._arrivals:
                needs.append(self._arrivals[rank, need])
            else:
                return False

        node = self._add(action.stage, action.op, needs)
        self._results[result(action)] = (rank, node)
        first = self.extents[rank][0]
        self.extents[rank] = (node if first < 0 else first, node)
        return True

    def _transfer(self, rank: int, action: Action) -> None:
        """Note one end; with the second one the transfer has a node."""
        self._issued[rank, action] = self.extents[rank][1]
        assert action.peer is not None, f"the transfer {action} has no peer"
        other = (action.peer, counterpart(rank, action))
        if other not in self._issued:
            return
        sends = action.op.is_send
        link = (rank, action.peer) if sends else (action.peer, rank)
        send = action if sends else other[1]
        needs = [self._issued[rank, action], self._issued[other], self._links.get(link, -1)]
        node = self._add(send.stage, send.op, [need for need in needs if need >= 0])
        self._links[link] = node
        op = Op.FORWARD if send.op is Op.SEND_FORWARD else Op.BACKWARD
        self._arrivals[link[1], Action(op, send.stage, send.microbatch)] = node

    def _add(self, stage: int, op: Op, needs: Sequence[int]) -> int:
        kind = self.kinds.setdefault((stage, op), len(self.kinds))
        self.nodes.append((kind, tuple(needs)))
        return len(self.nodes) - 1


def table(durations: Sequence[Mapping[Op, float]], transfer: float) -> Callable[[int, Op], float]:
    """Durations by stage, and of a transfer, as `ProgramGraph` asks for them."""
    return lambda stage, op: durations[stage].get(op, transfer)
