"""Marks on the curves of a run: spikes with their data, restarts, returns, deferrals, changes.

- A spike that a later start undid is marked as undone: the curve behind it is another one.
- A spike that nothing closed reaches to the last step of its attempt.

Alternatives considered:
- Marks of the branch that counts only: the spike that a run went back for would be nowhere.
"""

from collections.abc import Iterable
from dataclasses import replace

from k2train.record.change_events import Change
from k2train.record.changes import what_text
from k2train.record.event import Event
from k2train.record.events import (
    ChunkDeferred,
    Resumed,
    RolledBack,
    Spike,
    StageTransition,
    StepSkipped,
)
from k2train.report.collect import RunView
from k2train.report.figure import Mark
from k2train.text import counted

CLOSED = ("benign", "malignant", "level")
"""Kinds of spike events that close what an earlier one opened."""
OPENED = ("opened", "restart")
MOST_CHUNKS = 3
"""Chunks of a spike that are named."""


def event_marks(run: RunView) -> list[Mark]:
    """All marks of a run, by step; those behind its last step are left out."""
    found = _spikes(run)
    for event in run.events:
        found += _mark_of(event)
    last = float(max(run.last_step, 1))
    return [replace(mark, last=min(mark.last, last)) for mark in found if mark.first <= last]


def data_text(run: RunView, event: Spike) -> str:
    """Say which rows the first step of a spike read, and of which chunks all its steps; "" if
    no step of it is on record."""
    onset = event.step if event.onset is None else event.onset
    # A spike may have been opened by an earlier start than the one that closed it.
    rows = {
        record.step: record
        for step in range(onset, max(event.step, onset) + 1)
        for record in run.by_step.get(step, ())
        if record.attempt <= event.attempt
    }
    first = rows.get(onset)
    if first is None:
        return ""
    chunks = list(dict.fromkeys(one.chunk for one in rows.values() if one.chunk != first.chunk))
    at = f" rows {first.rows[0]:,} to {first.rows[1] - 1:,}" if len(first.rows) == 2 else ""
    more = f", then {', '.join(chunks[:MOST_CHUNKS])}" if chunks else ""
    left = len(chunks) - MOST_CHUNKS
    rest = f" and {counted(left, 'more chunk')}" if left > 0 else ""
    return f"{first.chunk}{at}{more}{rest}"


def _spikes(run: RunView) -> list[Mark]:
    found: list[Mark] = []
    opened: dict[int, Spike] = {}
    for event in run.events:
        if not isinstance(event, Spike):
            continue
        if event.kind in OPENED:
            opened[event.step] = event
        elif event.kind in CLOSED and event.onset is not None:
            opened.pop(event.onset, None)
            found.append(_spike(run, event, event.kind, event.onset, event.step))
    lasts = {record.attempt: record.step for record in run.records}
    for onset, event in opened.items():
        found.append(_spike(run, event, "open", onset, max(onset, lasts.get(event.attempt, onset))))
    return sorted(found, key=lambda mark: mark.first)


def _spike(run: RunView, event: Spike, kind: str, first: int, last: int) -> Mark:
    peak = "" if event.peak_loss is None else f", peak loss {event.peak_loss:.4g}"
    data = data_text(run, event)
    undone = run.starts.undid(event.attempt, first)
    text = (
        f"{kind} spike, steps {first:,} to {last:,}{peak}"
        + (f", first read {data}" if data else "")
        + (", undone" if undone else "")
    )
    return Mark(kind, first, last, text, undone)


def _mark_of(event: Event) -> Iterable[Mark]:
    if isinstance(event, RolledBack):
        moved = f", {', '.join(event.chunks)} moved to the end" if event.chunks else ""
        text = (
            f"return from step {event.from_step:,} to {event.checkpoint} "
            f"(step {event.step:,}){moved}"
        )
        yield Mark("return", event.step, event.step, text)
    elif isinstance(event, ChunkDeferred):
        text = f"{event.chunk} moved to position {event.order_index} after step {event.step:,}"
        yield Mark("deferral", event.step, event.step, text)
    elif isinstance(event, Resumed):
        text = f"start {event.attempt} from {event.checkpoint} (step {event.step:,})"
        yield Mark("restart", event.step, event.step, text)
    elif isinstance(event, Change) and event.changes:
        text = f"after step {event.step:,} {what_text(event)}"
        yield Mark("change", event.step, event.step, text)
    elif isinstance(event, StepSkipped):
        why = event.reason or "not finite"
        text = f"step {event.step:,} left out: {why}, {event.chunk}"
        yield Mark("skipped", event.step, event.step, text)
    elif isinstance(event, StageTransition):
        yield Mark("stage", 0, 0, f"from {event.parent} at step {event.parent_step:,}")
