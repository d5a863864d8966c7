"""Text of a run beside its plan: the step, a sentence for what is most wrong, terms and lanes.

- Terms are seconds of a step; a sentence names what is wrong, by how much, and what it moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from k2train.plan.step_time import step_time
from k2train.planner.compare import NOTHING, OPERATIONS, Comparison, Row
from k2train.planner.compare_run import Compared, RecordedRun, device_note
from k2train.planner.lanes import BUBBLE, HOST, LANE_TERMS
from k2train.planner.planned_step import workload_of
from k2train.text import UNKNOWN, counted, span_text, table

SMALL = 0.02
"""Share of the planned step that a term must move to be called wrong."""
HIDDEN = 1.25
"""Ratio from which a stage is called slow although no rank waits for it."""
MOST_ROWS = 20
"""Terms that are shown; --json has all."""


def text(found: Compared) -> str:
    """The whole answer."""
    run = found.run
    lines = [_run_line(run), _plan_line(found)]
    if run.attempt != run.newest_attempt:
        lines.append(
            f"note      attempt {run.newest_attempt} is newer and has no recorded actions; its "
            "config.yaml is read for both"
        )
    if found.cluster is not None and (note := device_note(run, found.cluster)):
        lines.append(f"note      {note}")
    if found.comparison is None:
        return "\n".join([*lines, *_whole_step(found)])

    one = found.comparison
    lines += [f"note      {note}" for note in one.measured.notes]
    lines += [_step_line(one), "", sentence(one), "", *_terms(one), "", *_lanes(one)]
    return "\n".join(lines)


def _run_line(run: RecordedRun) -> str:
    layout, p = run.setup.layout, run.setup.config.parallel
    device = f"; {run.device}" if run.device else ""
    count = run.setup.num_microbatches
    return (
        f"run       {run.directory}, attempt {run.attempt}: {layout.world_size} "
        f"process{'' if layout.world_size == 1 else 'es'} = pipeline {layout.pipeline} x data "
        f"{layout.data} x tensor {layout.tensor}, {p.schedule}, "
        f"{count} micro-batch{'' if count == 1 else 'es'} of "
        f"{run.setup.config.batch.micro_sequences}{device}"
    )


def _plan_line(found: Compared) -> str:
    if found.cluster is not None:
        return f"plan      on {found.cluster.name} ({found.cluster.device.name}), by every term"
    if found.comparison is None:
        return "plan      without --cluster it has no seconds"
    return (
        "plan      its shape, scaled to the median of the measured actions (no --cluster); "
        "terms with - are taken as measured"
    )


def _step_line(one: Comparison) -> str:
    measured, numbers = one.measured, one.measured.steps
    ratio = measured.seconds / one.planned_seconds
    between = f", {_s(measured.between)} between steps" if measured.between else ""
    return (
        f"step      planned {_s(one.planned_seconds)}, measured {_s(measured.seconds)} "
        f"({_ratio(ratio)} times), the mean of step{'s' if len(numbers) > 1 else ''} "
        f"{span_text(numbers[0], numbers[-1])}{between}\n"
        "order     every rank did its actions in the planned order"
    )


def sentence(one: Comparison) -> str:
    """Name the most wrong term, by how much, and what it moves; and a slow stage that is hidden."""
    causes = [row for row in one.rows if row.moves is not None and row.planned is not None]
    first = causes[0] if causes else None
    if first is None or first.moves is None or abs(first.moves) < SMALL * one.planned_seconds:
        told = f"No term moves the planned step by {SMALL:.0%}: the plan holds."
        first = None
    else:
        told = (
            f"{_how_wrong(one, first)}: alone it moves the planned step by "
            f"{_signed(first.moves)} ({first.moves / one.planned_seconds:+.0%})."
        )

    slow = max(causes, key=lambda row: row.ratio or 0.0, default=None)
    if slow is None or slow is first or (slow.ratio or 0.0) < HIDDEN or slow.kind is None:
        return told
    if slow.moves is not None and abs(slow.moves) >= SMALL * one.planned_seconds:
        return told
    return (
        f"{told} Others hide it, but {_term(one, slow)} took {_ratio(slow.ratio)} times the plan."
    )


def _term(one: Comparison, row: Row) -> str:
    if row.kind is None:
        return row.term
    return f"stage {row.kind[0]}'s {OPERATIONS[row.kind[1]]} ({stage_text(one, row.kind[0])})"


def _how_wrong(one: Comparison, row: Row) -> str:
    assert row.planned is not None, "a term without a plan is not wrong"
    count, what = one.setup.num_microbatches, _term(one, row)
    own, planned, each = row.measured, row.planned, "a step"
    if row.kind is not None:
        own, planned, each = own / count, planned / count, "a micro-batch"
    if not planned:
        return f"{what} took {_s(own)} {each}, planned none"
    return f"{what} took {_ratio(own / planned)} times the plan, {_s(own)} {each} for {_s(planned)}"


def stage_text(one: Comparison, stage: int) -> str:
    """What a stage holds: `embedding, layers 0 to 3`."""
    layout = one.setup.layout
    layers = layout.layers_of(stage, one.setup.architecture.num_layers)
    plural = "s" if len(layers) > 1 else ""
    parts = ["embedding"] if stage == 0 else []
    parts.append(f"layer{plural} {span_text(layers[0], layers[-1])}")
    if stage == layout.num_stages - 1:
        parts.append("head and loss")
    return ", ".join(parts)


def _terms(one: Comparison) -> list[str]:
    rows = []
    for row in one.rows:
        ratio = _ratio(row.ratio)
        moves = UNKNOWN if row.moves is None or row.planned is None else _signed(row.moves)
        name = row.term
        if row.term == HOST and one.measured.loader:
            name += f" (loader {_s(one.measured.loader)})"
        if row.term == BUBBLE:
            name += " (follows from the others)"
        planned = UNKNOWN if row.planned is None else _s(row.planned)
        rows.append([name, planned, _s(row.measured), ratio, moves])
    heads = ["term of a step", "planned", "measured", "times", "moves the step by"]
    shown = rows if len(rows) <= MOST_ROWS else [*rows[: MOST_ROWS - 1], rows[-1]]
    lines = table(heads, shown, heads[:1], drop_unknown=False)
    if len(shown) < len(rows):
        lines.append(f"{len(rows) - len(shown)} more terms, which move it less (--json)")
    return lines


def _lanes(one: Comparison) -> list[str]:
    """Milliseconds of each pipeline rank by term, planned and measured in turns."""
    used = [
        term
        for term in LANE_TERMS
        if any(lane[term] > NOTHING for lane in (*one.measured.lanes, *one.planned_lanes))
    ]
    rows = []
    for pp, (planned, measured) in enumerate(
        zip(one.planned_lanes, one.measured.lanes, strict=True)
    ):
        for name, lane in (("planned", planned), ("measured", measured)):
            whole = sum(lane.values())
            rows.append([f"{pp} {name}", *(_ms(lane[term]) for term in used), _ms(whole)])
    return table(["pipeline rank, ms", *used, "step"], rows, ("pipeline rank, ms",))


def _ms(seconds: float) -> str:
    """Milliseconds with four digits, and never a power of ten."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1e3 else f"{value:.4g}" if value >= 0.001 else "0"


def _whole_step(found: Compared) -> list[str]:
    """What the record of whole steps allows."""
    run, seconds = found.run, found.run.step_seconds
    assert seconds is not None, "there are recorded steps"
    rows = run.rows
    lines = [
        f"step      measured {_s(seconds)}, the median of {counted(len(rows), 'step')} "
        f"({span_text(rows[0].step, rows[-1].step)} in metrics.jsonl)"
    ]
    if found.cluster is not None:
        step = step_time(workload_of(run.setup, found.cluster, run.device_type), found.cluster)
        terms = ", ".join(f"{name} {_s(part)}" for name, part in step.terms.items() if part)
        lines += [
            f"          planned {_s(step.seconds)}: measured is "
            f"{_ratio(seconds / step.seconds)} times the plan",
            f"          planned terms: {terms}",
        ]
    lines += [
        "",
        "No actions were recorded, so which term differs, the bubble and the order of actions are "
        "not known.",
        "Record some steps of the next start: profile.actions=[FIRST,LAST].",
    ]
    return lines


def as_json(found: Compared) -> dict[str, Any]:
    """The comparison for programs."""
    run, one = found.run, found.comparison
    whole: dict[str, Any] = {
        "run": str(run.directory),
        "attempt": run.attempt,
        "device": run.device or None,
        "cluster": None if found.cluster is None else found.cluster.name,
        "metrics_step_seconds": run.step_seconds,
    }
    if one is None:
        return whole | {"terms": None}
    rows: Sequence[Mapping[str, Any]] = [
        {
            "term": row.term,
            "planned": row.planned,
            "measured": row.measured,
            "moves": None if row.planned is None else row.moves,
        }
        for row in one.rows
    ]
    return whole | {
        "steps": list(one.measured.steps),
        "planned_seconds": one.planned_seconds,
        "measured_seconds": one.measured.seconds,
        "sentence": sentence(one),
        "terms": rows,
        "planned_lanes": [dict(lane) for lane in one.planned_lanes],
        "measured_lanes": [dict(lane) for lane in one.measured.lanes],
        "notes": list(one.measured.notes),
    }


def _s(seconds: float) -> str:
    """Format seconds, with milliseconds for short ones."""
    if abs(seconds) < 1:
        return f"{1e3 * seconds:.3g} ms" if abs(seconds) < 0.1 else f"{1e3 * seconds:.0f} ms"
    return f"{seconds:.3f} s" if seconds < 100 else f"{seconds:.1f} s"


def _ratio(value: float | None) -> str:
    """Format a ratio: two decimals, none where it is far from 1."""
    return UNKNOWN if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _signed(seconds: float) -> str:
    return ("+" if seconds >= 0 else "-") + _s(abs(seconds))
