"""Agreement of the two files with held-out losses: `metrics.jsonl` and `held_out.jsonl`.

- An evaluation is one line of the metrics, written first, then a line of `held_out.jsonl` for each
  set. A kill between them costs lines of the second file, and the next start adds them.
- Runs of older versions have lines in `held_out.jsonl` alone. The first evaluation in the metrics
  says from which start on both files have to have it.

Alternatives considered:
- `held_out.jsonl` first: after a kill among its lines nobody knows which sets are still to come.
- One file in place of the other: scripts read `held_out.jsonl`, and old runs have it alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from k2train.errors import RunError
from k2train.record.branch import Starts
from k2train.record.held_out import HeldOutRecord, ScoresRecord
from k2train.record.jsonl import encode_line, read_lines
from k2train.record.line_check import checked_rows
from k2train.record.metrics import MetricsWriter, StepRecord, checked_records, is_scores_line
from k2train.record.step_gaps import is_damaged, whole_records
from k2train.retry import exists_retried, is_file_retried
from k2train.text import counted

Key = tuple[int, int, str]
"""Attempt, step and set of a score."""


def complete_scores(metrics: Path, held_out: MetricsWriter) -> str:
    """Add to `held_out.jsonl` the scores that the metrics have and it lacks.

    Returns what was done, "" if nothing. Raises RunError when a file cannot be read, OSError when
    it cannot be written.
    """
    known = {_key(record) for _, record in whole_records(held_out.path, HeldOutRecord)}
    missing = [one for _, one in evaluated_sets(metrics) if _key(one) not in known]
    for record in missing:
        held_out.write(record)
    if not missing:
        return ""
    return f"{held_out.path.name}: {counted(len(missing), 'line')} added from {metrics.name}"


def evaluated_sets(metrics: Path) -> Iterator[tuple[int, HeldOutRecord]]:
    """Yield the scores in the metrics with the number of their line; none without the file.

    Damaged lines are left out.
    """
    lines, _ = read_lines(metrics) if is_file_retried(metrics) else ([], b"")
    for number, line in enumerate(lines, 1):
        # Only these are parsed: a long run has hundreds of thousands of steps.
        if not is_scores_line(line):
            continue
        ((_, row),) = checked_rows(metrics, [line])
        # The values of a line without a check may be anything.
        with suppress(ValueError, TypeError, AttributeError):
            if not isinstance(row, RunError):
                yield from [(number, record) for record in ScoresRecord.of(row).records()]


def file_differences(metrics: Path, held_out: Path) -> Iterator[tuple[str, bool]]:
    """Say where the two files differ, and whether the next start makes it good.

    Nothing is said of files with damaged lines, which are problems of their own. Raises RunError
    when a file cannot be read.
    """
    if is_damaged(metrics) or is_damaged(held_out):
        return

    evaluated = {_key(record): (line, record) for line, record in evaluated_sets(metrics)}
    recorded = {_key(r): (line, r) for line, r in whole_records(held_out, HeldOutRecord)}
    for key, (line, record) in evaluated.items():
        if key not in recorded:
            yield (
                f"{held_out}: {_named(record)} in {metrics.name}, line {line}, has no line; the "
                "next start adds it",
                True,
            )
            continue
        other = recorded[key]
        if encode_line(record.row()) != encode_line(other[1].row()):
            yield (
                f"{metrics}: line {line} has {_named(record)} as {record.loss} over {record.rows} "
                f"rows, {held_out.name}, line {other[0]} as {other[1].loss} over {other[1].rows}: "
                "one of them was changed",
                False,
            )

    yield from _only_held_out(metrics, held_out, evaluated, recorded)


def _only_held_out(
    metrics: Path,
    held_out: Path,
    evaluated: Iterable[Key],
    recorded: dict[Key, tuple[int, HeldOutRecord]],
) -> Iterator[tuple[str, bool]]:
    """Say which scores that count the metrics lack, since they have any."""
    known = set(evaluated)
    first = min((attempt for attempt, _, _ in known), default=None)
    if first is None:
        return
    starts = Starts(record for _, record in whole_records(metrics, StepRecord))
    # What a power cut took from the metrics, it took with the steps before it.
    counting = {_key(one) for one in starts.scores(record for _, record in recorded.values())}
    for key, (line, record) in recorded.items():
        if key[0] >= first and key in counting - known:
            yield (
                f"{metrics}: {_named(record)} in {held_out.name}, line {line}, has no line",
                False,
            )


def read_scores(held_out: Path) -> list[HeldOutRecord]:
    """Read all scores in the order written; none without the file.

    Raises RunError when a line is damaged, naming it.
    """
    found = []
    for _, record in checked_records(held_out, HeldOutRecord) if exists_retried(held_out) else ():
        if isinstance(record, RunError):
            raise record
        found.append(record)
    return found


def _key(record: HeldOutRecord) -> Key:
    return record.attempt, record.step, record.set


def _named(record: HeldOutRecord) -> str:
    return f"the score of set {record.set} at step {record.step}, attempt {record.attempt},"
