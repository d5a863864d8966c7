"""Picture of one step of a run: planned above measured, for each pipeline rank.

- The measured step is a real one, the nearest to the median of those compared. Time 0 is where its
  pipeline begins, and where the planned one does.
- Ranks are those of the first pipeline that is recorded whole.

Alternatives considered:
- Mean spans: a step that never happened, without the waits that single actions cause.
"""

from __future__ import annotations

from collections.abc import Iterator

from k2train.plan.action import Op
from k2train.plan.draw_lanes import Box, Pair, lanes_svg
from k2train.plan.simulate import simulate
from k2train.planner.compare import Comparison
from k2train.planner.compare_run import Compared, step_of
from k2train.planner.lanes import DATA, HOST, OPTIMIZER
from k2train.record.action_trace import StepTrace, TraceSpan

PHASES = {"data": "host", "reduce": "data", "update": "update"}
"""Phases of a step that are drawn, and as what."""


def picture(found: Compared) -> str:
    """SVG of the comparison, which has recorded actions."""
    one = found.comparison
    assert one is not None, "a picture shows recorded actions"
    traces = {trace.facts.rank: trace for trace in found.run.traces}
    layout = one.setup.layout
    group = next(g for g in layout.groups("pp") if all(rank in traces for rank in g))
    number = step_of([traces[rank] for rank in group], one.measured.steps)
    lanes = [next(s for s in traces[rank].steps if s.step == number) for rank in group]
    zero = min(span.begin for lane in lanes for span in lane.spans if _op(span) is not None)

    planned = _planned(one)
    pairs = [
        Pair(f"rank {rank}", planned[pp], list(_measured(lane, zero)))
        for pp, (rank, lane) in enumerate(zip(group, lanes, strict=True))
    ]
    on = "the plan's shape" if found.cluster is None else f"planned on {found.cluster.name}"
    title = f"{found.run.directory.name}, step {number}: {on} (plan) above measured (real)"
    return lanes_svg(pairs, title)


_OPS = {op.value: op for op in Op if op.is_compute}


def _op(span: TraceSpan) -> Op | None:
    """Operation of a compute action; None for anything else."""
    if span.kind != "action" or ">" in span.name or "<" in span.name:
        return None
    return _OPS[span.name.strip("0123456789")]


def _planned(one: Comparison) -> list[list[Box]]:
    """Boxes of each pipeline rank: its actions, and behind the last of all what follows."""
    own = {kind: time.seconds for kind, time in one.planned.actions.items()}
    transfer = one.planned.transfer
    spans = simulate(one.setup.programs, lambda a: own.get((a.stage, a.op), transfer))
    computes = [span for span in spans if span.action.op.is_compute]
    end = max(span.end_seconds for span in computes)
    found: list[list[Box]] = [[] for _ in one.planned_lanes]
    for span in computes:
        a = span.action
        found[span.rank].append(
            _box(a.op.value, span.start_seconds, span.end_seconds, str(a.microbatch), str(a))
        )

    for lane, boxes in zip(one.planned_lanes, found, strict=True):
        at = end
        for kind, term in (("data", DATA), ("update", OPTIMIZER), ("host", HOST)):
            if lane[term] > 0:
                boxes.append(_box(kind, at, at + lane[term], "", term))
                at += lane[term]
    return found


def _measured(lane: StepTrace, zero: float) -> Iterator[Box]:
    for span in lane.spans:
        op = _op(span)
        begin, end = span.begin - zero, span.end - zero
        if op is not None:
            yield _box(op.value, begin, end, span.name.partition(op.value)[2], span.name)
        elif span.kind == "phase" and span.name in PHASES:
            yield _box(PHASES[span.name], begin, end, "", span.name)


def _box(kind: str, begin: float, end: float, label: str, name: str) -> Box:
    return Box(kind, begin, end, label, f"{name}: {begin:.4g} to {end:.4g} s, {end - begin:.4g} s")
