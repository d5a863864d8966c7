"""Completeness of a run's step records: steps, state roots and held-out scores that are missing.

- A line's own check finds a changed line. It cannot see one that was cut out, moved or doubled.
- A checkpoint of step n proves that the steps up to n were done: each must have a line in
  `metrics.jsonl`, of whatever attempt.
- The steps of one attempt follow each other, as the lines of the file do.
- A line of the metrics that has a state root proves a line of `state_roots.jsonl`; a manifest with
  scores proves lines of `held_out.jsonl`.

Alternatives considered:
- A chain of hashes, as the ledger has: a kill may tear the last lines of these files, and a start
  would have to mend the chain.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from k2train.errors import RunError
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import R, RootRecord, StepRecord, checked_records, damaged_rows
from k2train.retry import is_file_retried
from k2train.text import counted

Position = tuple[int, int]
"""Attempt and step."""


def step_problems(metrics: Path, roots: Path, newest: int) -> Iterator[str]:
    """Say what is missing of the steps up to `newest`, which are known to be done.

    Nothing is said of files with damaged lines, which are problems of their own. Raises RunError
    when a file cannot be read.
    """
    if is_damaged(metrics):
        return
    rows = list(whole_records(metrics, StepRecord))
    yield from metrics_gaps(metrics, rows, newest)
    if not is_damaged(roots):
        recorded = {(root.attempt, root.step) for _, root in whole_records(roots, RootRecord)}
        yield from root_gaps(roots, rows, recorded)


def score_problems(path: Path, scored: Iterable[tuple[str, int, str]]) -> Iterator[str]:
    """Say which scores are missing in `held_out.jsonl`, at `path`.

    `scored` has the name of a checkpoint, its step and the name of a set.
    """
    if not is_damaged(path):
        recorded = {(line.step, line.set) for _, line in whole_records(path, HeldOutRecord)}
        yield from score_gaps(path, scored, recorded)


def is_damaged(path: Path) -> bool:
    """Whether a file has damaged lines; one that is not there has none.

    Raises RunError, UnavailableError when it cannot be read.
    """
    return is_file_retried(path) and bool(damaged_rows(path))


def whole_records(path: Path, kind: type[R]) -> Iterator[tuple[int, R]]:
    """Yield the whole lines of a file with their numbers; none without the file."""
    for line, record in checked_records(path, kind) if is_file_retried(path) else ():
        if not isinstance(record, RunError):
            yield line, record


def metrics_gaps(path: Path, rows: Sequence[tuple[int, StepRecord]], newest: int) -> Iterator[str]:
    """Say which steps up to `newest` have no line, and which lines do not follow each other.

    `rows` are the lines of `metrics.jsonl` with their numbers; `newest` is a step that is known to
    be done.
    """
    missing = sorted(set(range(1, newest + 1)) - {row.step for _, row in rows})
    if missing:
        yield (
            f"{path}: {_steps(missing)} of the {newest} up to the newest checkpoint "
            f"{'has' if len(missing) == 1 else 'have'} no line"
        )

    before: dict[int, int] = {}
    for line, row in rows:
        last = before.get(row.attempt)
        # A step that is missing was told.
        passed_over = range(row.step if last is None else last + 1, row.step)
        if last is not None and (row.step <= last or not set(passed_over) <= set(missing)):
            yield (
                f"{path}: line {line} is of step {row.step} of attempt {row.attempt}, after its "
                f"step {last}: lines were moved, doubled or cut out"
            )
        before[row.attempt] = row.step


def root_gaps(
    path: Path, rows: Iterable[tuple[int, StepRecord]], recorded: Collection[Position]
) -> Iterator[str]:
    """Say which steps have a root in the metrics and no line in `state_roots.jsonl`, at `path`."""
    wanted = [row for _, row in rows if row.state_root is not None]
    missing = sorted(row.step for row in wanted if (row.attempt, row.step) not in recorded)
    if missing:
        yield f"{path}: {_steps(missing)}, whose root is in the metrics, have no line"


def score_gaps(
    path: Path, scored: Iterable[tuple[str, int, str]], recorded: Collection[tuple[int, str]]
) -> Iterator[str]:
    """Say which of the `scored` are not among the `recorded` steps and sets."""
    for checkpoint, step, name in scored:
        if (step, name) not in recorded:
            yield f"{path}: the score of set {name} at step {step}, in {checkpoint}, has no line"


def _steps(steps: Sequence[int]) -> str:
    """`3 steps, the first is 31`."""
    first = f"step {steps[0]}" if len(steps) == 1 else counted(len(steps), "step")
    return first if len(steps) == 1 else f"{first}, the first is {steps[0]},"
