"""Measured lanes: recorded steps of a run by term, so that each rank's terms sum to its step.

- Own work of an action is what remains of it without its exchanges.
- The pipeline's window reaches from the first action of its ranks to their last one. In it, a rank
  without work waits: for the schedule (bubble), or for single actions and transfers.
- The bubble is what the action lists leave idle when every action takes its mean time and
  transfers take none. What a window has beyond that is pipeline traffic.
- Means are over steps, micro-batches and replicas: only of means the sums are exact.

Alternatives considered:
- Each wait as what it waited for: a transfer that comes late because its sender was late would be
  traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from k2train.errors import RunError
from k2train.plan.action import Op, Program
from k2train.plan.layout import Layout
from k2train.plan.program_graph import graph_of
from k2train.record.action_trace import RankTrace, StepTrace, TraceSpan
from k2train.text import counted

COMPUTE, TENSOR, BUBBLE, PIPELINE = "compute", "tensor traffic", "bubble", "pipeline traffic"
DATA, OPTIMIZER, HOST = "data traffic", "optimizer", "host and loader"
LANE_TERMS = (COMPUTE, TENSOR, BUBBLE, PIPELINE, DATA, OPTIMIZER, HOST)
"""Terms of a pipeline rank's step, which sum to it."""
LOADER = "data"
"""Phase of a step that reads its batch."""

Kind = tuple[int, Op]


@dataclass(frozen=True)
class ActionTime:
    """Seconds of one action: its own work, and tensor- and data-parallel exchanges."""

    compute: float = 0.0
    tensor: float = 0.0
    data: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.tensor + self.data


Actions = Mapping[Kind, ActionTime]


def pipeline_seconds(programs: Sequence[Program], actions: Actions, transfer: float = 0.0) -> float:
    """Seconds from the first action to the last one, each as long as its kind."""
    found = {kind: one.seconds for kind, one in actions.items()}
    return graph_of(programs).seconds(lambda stage, op: found.get((stage, op), transfer))


@dataclass(frozen=True)
class Measured:
    """Means of the recorded steps."""

    layout: Layout
    steps: tuple[int, ...]
    actions: Actions
    lanes: tuple[Mapping[str, float], ...]
    """Seconds of a step by term, of each pipeline rank; with `LANE_TERMS` as keys."""
    loader: float
    """Seconds of a step that its batch was read, part of `host and loader`."""
    between: float
    """Seconds between two recorded steps: the record, saves, evaluations."""
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of a step, the mean over pipeline ranks."""
        return fmean(sum(lane.values()) for lane in self.lanes)

    def mean(self, term: str) -> float:
        """Seconds of a step in one term, the mean over pipeline ranks."""
        return fmean(lane[term] for lane in self.lanes)


@dataclass
class _Parts:
    """One step of one rank, seconds."""

    actions: dict[str, list[float]] = field(default_factory=dict)
    """Own work, tensor and data exchanges of each compute action, by its printed form."""
    data: float = 0.0
    optimizer: float = 0.0
    host: float = 0.0
    loader: float = 0.0
    """Outside of the pipeline's window."""


def measure(traces: Sequence[RankTrace], layout: Layout, programs: Sequence[Program]) -> Measured:
    """Means of the steps that all traces have. Raises RunError where a pipeline is not complete."""
    by_rank = {trace.facts.rank: trace for trace in traces}
    notes: list[str] = []
    groups = _groups(by_rank, layout, notes)
    steps = _usable_steps([by_rank[rank] for group in groups for rank in group], layout, programs)
    notes += steps.notes

    kinds = {str(a): (a.stage, a.op) for p in programs for a in p if a.op.is_compute}
    found: list[list[_Parts]] = [[] for _ in range(layout.pipeline)]
    windows: list[float] = []
    for group in groups:
        for number in steps.numbers:
            done = [steps.of[rank][number] for rank in group]
            begin, end = _window(done, kinds)
            windows.append(end - begin)
            for pp, step in enumerate(done):
                found[pp].append(_parts(step, (begin, end), kinds))

    actions = _means(found, kinds)
    ideal = pipeline_seconds(programs, actions)
    window = fmean(windows)
    lanes = tuple(_lane(parts, window, window - ideal, layout) for parts in found)
    loader = fmean(part.loader for parts in found for part in parts)
    ranks = [rank for group in groups for rank in group]
    between = _between([steps.of[rank] for rank in ranks])
    return Measured(layout, steps.numbers, actions, lanes, loader, between, tuple(notes))


def _groups(
    by_rank: Mapping[int, RankTrace], layout: Layout, notes: list[str]
) -> list[tuple[int, ...]]:
    """Ranks of each pipeline that is recorded whole, first to last."""
    groups = layout.groups("pp")
    whole = [group for group in groups if all(rank in by_rank for rank in group)]
    missing = [rank for group in groups for rank in group if rank not in by_rank]
    shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
    if not whole:
        raise RunError(
            f"the recorded actions lack {counted(len(missing), 'rank')} of {layout.world_size} "
            f"({shown}), and no pipeline is whole: are the files of all ranks in one folder?"
        )
    if missing:
        notes.append(f"without ranks {shown}, which left no file")
    return whole


@dataclass(frozen=True)
class _Usable:
    numbers: tuple[int, ...]
    of: Mapping[int, Mapping[int, StepTrace]]
    notes: tuple[str, ...]


def _usable_steps(
    traces: Sequence[RankTrace], layout: Layout, programs: Sequence[Program]
) -> _Usable:
    """Steps that every trace has, in the plan's order; without the first one of a start."""
    of = {trace.facts.rank: {step.step: step for step in trace.steps} for trace in traces}
    common = set.intersection(*(set(steps) for steps in of.values()))
    warm = {trace.facts.first_step for trace in traces}
    notes = []
    if common - warm and common & warm:
        notes.append(f"without step {min(common & warm)}, the first of its start, which warms up")
        common -= warm
    elif common & warm:
        notes.append("the only step is the first of its start, which is slower than others")

    for rank, steps in of.items():
        planned = [str(action) for action in programs[layout.coordinate(rank).pp]]
        for number in sorted(common):
            if problem := order_problem(steps[number], planned):
                notes.append(f"without step {number}: on rank {rank} {problem}")
                common.discard(number)
    if not common:
        why = f": {'; '.join(notes)}" if notes else ""
        raise RunError(f"no recorded step can be compared with the plan{why}")
    return _Usable(tuple(sorted(common)), of, tuple(notes))


def order_problem(step: StepTrace, planned: Sequence[str]) -> str:
    """Say where a step's actions differ from the plan's list; "" where they are the same."""
    done = [span.name for span in step.spans if span.kind == "action"]
    if done == list(planned):
        return ""
    times = len(done) // max(1, len(planned))
    if times > 1 and done == list(planned) * times:
        return "its actions were done more than once, to check a result"
    place = next(
        (i for i, (a, b) in enumerate(zip(done, planned, strict=False)) if a != b),
        min(len(done), len(planned)),
    )
    was = done[place] if place < len(done) else "none"
    plan = planned[place] if place < len(planned) else "none"
    return f"action {place + 1} was {was}, planned {plan}"


def _window(lanes: Sequence[StepTrace], kinds: Mapping[str, Kind]) -> tuple[float, float]:
    """First begin and last end of the compute actions of a pipeline."""
    spans = [span for lane in lanes for span in lane.spans if span.name in kinds]
    return min(span.begin for span in spans), max(span.end for span in spans)


def segments(step: StepTrace) -> Iterator[tuple[float, float, tuple[TraceSpan, ...]]]:
    """Yield (begin, end, open spans, outermost first): parts of a step without overlap or gap."""
    open_: list[TraceSpan] = []
    at = step.begin
    for span in step.spans:
        while len(open_) >= span.depth:
            yield at, open_[-1].end, tuple(open_)
            at = open_.pop().end
        yield at, span.begin, tuple(open_)
        at = span.begin
        open_.append(span)
    while open_:
        yield at, open_[-1].end, tuple(open_)
        at = open_.pop().end
    yield at, step.end, ()


def _parts(step: StepTrace, window: tuple[float, float], kinds: Mapping[str, Kind]) -> _Parts:
    """Book every moment of a step on what it was spent on."""
    parts = _Parts()
    for begin, end, path in segments(step):
        action = next((span.name for span in path if span.kind == "action"), None)
        axis = path[-1].name.split()[-1] if path and path[-1].kind == "exchange" else ""
        if action in kinds:
            own = parts.actions.setdefault(str(action), [0.0, 0.0, 0.0])
            own[{"tp": 1, "dp": 2}.get(axis, 0)] += end - begin
            continue

        # What lies in the window is a wait, whatever it is for.
        outside = max(0.0, min(end, window[0]) - begin) + max(0.0, end - max(begin, window[1]))
        phase = next((span.name for span in path if span.kind == "phase"), "")
        if axis == "dp":
            parts.data += outside
        elif phase in ("reduce", "update"):
            parts.optimizer += outside
        else:
            parts.host += outside
            parts.loader += outside if phase == LOADER else 0.0
    return parts


def _means(found: Sequence[Sequence[_Parts]], kinds: Mapping[str, Kind]) -> Actions:
    """Mean of each kind of action."""
    values: dict[Kind, list[list[float]]] = {}
    for parts in found:
        for part in parts:
            for name, own in part.actions.items():
                values.setdefault(kinds[name], []).append(own)
    return {
        kind: ActionTime(*(fmean(column) for column in zip(*rows, strict=True)))
        for kind, rows in sorted(values.items())
    }


def _lane(
    parts: Sequence[_Parts], window: float, beyond: float, layout: Layout
) -> dict[str, float]:
    """Terms of one pipeline rank; `beyond` is what the window has more than the action lists."""

    def mean(value: Callable[[_Parts], float]) -> float:
        return fmean(value(part) for part in parts)

    compute, tensor, inside = (
        mean(lambda part, i=i: sum(own[i] for own in part.actions.values()))  # type: ignore[misc]
        for i in range(3)
    )
    alone = layout.pipeline == 1
    return {
        COMPUTE: compute,
        TENSOR: tensor,
        BUBBLE: 0.0 if alone else window - beyond - compute - tensor - inside,
        # One pipeline rank waits for none: what is between its actions is the host's.
        PIPELINE: 0.0 if alone else beyond,
        DATA: inside + mean(lambda part: part.data),
        OPTIMIZER: mean(lambda part: part.optimizer),
        HOST: mean(lambda part: part.host) + (beyond if alone else 0.0),
    }


def _between(ranks: Sequence[Mapping[int, StepTrace]]) -> float:
    """Mean seconds from the end of a step to the next one, 0 for a single step."""
    gaps = [
        steps[number + 1].begin - steps[number].end
        for steps in ranks
        for number in steps
        if number + 1 in steps
    ]
    return fmean(gaps) if gaps else 0.0
