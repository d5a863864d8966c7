"""Newest rows of some late steps, read from the end of a possibly huge `metrics.jsonl`.

- A step that was done again has one row here: that of the last time.
- Damaged lines are left out; they are told where the file is opened.
"""

from contextlib import suppress
from pathlib import Path

from k2train.errors import RunError
from k2train.record.line_check import checked_rows
from k2train.record.metrics import POSITION, StepRecord, step_lines_backwards


def recent_steps(path: Path, first: int, last: int) -> list[StepRecord]:
    """Return the newest whole row of each step from `first` to `last`, in their order."""
    found: dict[int, StepRecord] = {}
    for line in step_lines_backwards(path):
        match = POSITION.match(line)
        if match is None:
            continue
        step = int(match[1])
        if step < first:
            break
        if step <= last and step not in found:
            ((_, row),) = checked_rows(path, [line])
            with suppress(ValueError):
                if not isinstance(row, RunError):
                    found[step] = StepRecord.of(row)
    return [found[step] for step in sorted(found)]
