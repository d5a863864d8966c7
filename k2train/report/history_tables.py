"""Tables of a run's history: its starts and how they ended, spikes with their data, changes.

- Cells are plain text; the page escapes them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from k2train.record.changes import change_lines
from k2train.record.event import Event
from k2train.record.events import (
    ChunkDeferred,
    Entry,
    Failed,
    Finished,
    Resumed,
    RolledBack,
    Spike,
    StageTransition,
    Started,
    StepSkipped,
    Stopped,
    of_kind,
)
from k2train.report.collect import RunView
from k2train.report.marks import CLOSED, data_text
from k2train.report.table import Table
from k2train.text import number


@dataclass
class _Start:
    """What the ledger says of one start, and with which event it ended."""

    began: str
    start: Started | Resumed
    parent: str = "-"
    end: Event | None = None


def starts_table(run: RunView) -> Table:
    """Starts with their layout, where they continued, and how they ended."""
    rows = []
    found = _starts(run.entries)
    for attempt, one in found.items():
        start = one.start
        steps = [time for time in run.times if time.attempt == attempt]
        rows.append(
            (
                str(attempt),
                one.began,
                start.checkpoint if isinstance(start, Resumed) else one.parent,
                f"{steps[0].first_step:,} to {steps[0].last_step:,}"
                if steps and steps[0].steps
                else "-",
                number(start.world_size),
                layout_text(start.layout),
                _end_text(one.end, last=attempt == max(found)),
            )
        )
    headings = ("start", "began (UTC)", "from", "steps", "processes", "layout", "end")
    return Table("Starts", headings, rows)


def layout_text(layout: str) -> str:
    """Shorten a layout of the ledger: `tensor 2, pipeline 1, data 4`."""
    degrees = re.findall(r"\b(tensor|pipeline|data)=(\d+)", layout)
    return ", ".join(f"{axis} {degree}" for axis, degree in degrees) or layout or "-"


def _starts(entries: Iterable[Entry]) -> dict[int, _Start]:
    found: dict[int, _Start] = {}
    parent, current = "-", 0
    for entry in entries:
        event = entry.event
        if isinstance(event, StageTransition):
            parent = event.parent
        elif isinstance(event, Started | Resumed):
            current = event.attempt
            found[current] = _Start(_time(entry), event, parent)
        elif isinstance(event, Finished | Stopped | Failed | RolledBack):
            # A later start may record the end of one that was killed.
            one = found.get(event.attempt)
            if one is not None and one.end is None:
                one.end = event
    return found


def _end_text(end: Event | None, last: bool) -> str:
    if isinstance(end, Finished):
        return "finished"
    if isinstance(end, Stopped):
        return f"stopped at step {end.step:,}: {end.problem or end.reason}"
    if isinstance(end, Failed):
        return f"failed: {end.problem}"
    if isinstance(end, RolledBack):
        return f"went back at step {end.from_step:,}"
    return "goes on, or no end on record" if last else "no end on record: killed, or a lost node"


def events_table(run: RunView) -> Table:
    """Spikes, returns, restarts, deferrals and skipped steps, oldest first."""
    rows = []
    for entry in run.entries:
        text = _event_text(run, entry.event)
        if text:
            step = getattr(entry.event, "step", None)
            rows.append((_time(entry), number(step), text))
    return Table("Spikes, restarts and deferrals", ("time (UTC)", "step", "what"), rows)


def _event_text(run: RunView, event: Event) -> str:
    if isinstance(event, Spike):
        return _spike_text(run, event)
    if isinstance(event, RolledBack):
        moved = ", ".join(event.chunks) or "nothing"
        return f"return to {event.checkpoint}; deferred: {moved}; {event.verdict}"
    if isinstance(event, ChunkDeferred):
        return f"{event.chunk} moved to position {event.order_index}"
    if isinstance(event, StepSkipped):
        return (
            f"step left out: {event.reason or 'not finite'}, {event.chunk} "
            f"rows {event.rows[0]:,} to {max(event.rows[1] - 1, 0):,}"
        )
    if isinstance(event, Resumed):
        return f"start {event.attempt} from {event.checkpoint}"
    return ""


def _spike_text(run: RunView, event: Spike) -> str:
    parts = [f"spike: {event.kind}"]
    if event.kind in CLOSED:
        parts[0] += f" since step {event.onset:,}" if event.onset is not None else ""
        parts += [f"peak loss {event.peak_loss:.4g}"] if event.peak_loss is not None else []
    else:
        parts += [f"loss {event.loss:.4g}"] if event.loss is not None else []
    parts.append(f"usual loss {event.usual_loss:.4g}")
    data = data_text(run, event)
    return "; ".join([*parts, *([f"first read {data}"] if data else [])])


def changes_table(run: RunView) -> Table:
    """Changes by hand with reason and outcome, and keys that a start had otherwise."""
    rows = [("", line.strip()) for line in change_lines(run.entries)]
    before: tuple[str, ...] = ()
    for event in of_kind(run.entries, Resumed):
        # A return within a process has the changes of its start again.
        if event.config_changes != before:
            rows += [(str(event.attempt), change) for change in event.config_changes]
        before = event.config_changes
    return Table("Changes of the configuration", ("start", "what"), rows)


def _time(entry: Entry) -> str:
    return entry.time[:19].replace("T", " ")
