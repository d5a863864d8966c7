"""Completeness of a run's step records: steps, state roots and held-out scores that are missing.

- A line's own check finds a changed line. It cannot see one that was cut out, moved or doubled.
- A checkpoint of step n proves that the steps up to n were done: each must have a line in
  `metrics.jsonl`, of whatever attempt.
- The steps of one attempt follow each other, as the lines of the file do.
- A line of the metrics that has a state root proves a line of `state_roots.jsonl`; a manifest with
  scores proves lines of `held_out.jsonl`, and so does the ledger.

Alternatives considered:
- A chain of hashes, as the ledger has: a kill may tear the last lines of these files, and a start
  would have to mend the chain.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class KnownScore:
    """A held-out loss as the manifest of a checkpoint or the ledger has it."""

    where: str
    """Name of the checkpoint, or line of the ledger."""
    step: int
    set: str
    loss: float
    rows: int


def score_problems(path: Path, scored: Iterable[KnownScore]) -> Iterator[str]:
    """Say which scores are missing in `held_out.jsonl`, at `path`, or are others there."""
    if is_damaged(path):
        return
    recorded: dict[tuple[int, str], list[HeldOutRecord]] = {}
    for _, line in whole_records(path, HeldOutRecord):
        recorded.setdefault((line.step, line.set), []).append(line)

    for score in scored:
        lines = recorded.get((score.step, score.set), [])
        named = f"the score of set {score.set} at step {score.step}, in {score.where},"
        if not lines:
            yield f"{path}: {named} has no line"
        elif not any(_same_score(score, line) for line in lines):
            yield (
                f"{path}: {named} is {score.loss} over {score.rows} rows, its last line says "
                f"{lines[-1].loss} over {lines[-1].rows}"
            )


def _same_score(score: KnownScore, line: HeldOutRecord) -> bool:
    # As text: a loss may be NaN.
    return (str(score.loss), score.rows) == (str(line.loss), line.rows)


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
    # Never a list of all steps: a forged ledger may claim more than memory holds.
    there = sorted({row.step for _, row in rows if 1 <= row.step <= newest})
    missing = newest - len(there)
    if missing:
        first = next((at for at, step in enumerate(there, 1) if step != at), len(there) + 1)
        yield (
            f"{path}: {_steps(missing, first)} of the {newest} up to the newest checkpoint "
            f"{'has' if missing == 1 else 'have'} no line"
        )

    before: dict[int, int] = {}
    for line, row in rows:
        last = before.get(row.attempt)
        # A step that is missing was told.
        if last is not None and (
            row.step <= last or not _all_missing(range(last + 1, row.step), there, newest)
        ):
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
        told = _steps(len(missing), missing[0]).removesuffix(",")
        yield f"{path}: {told}, whose root is in the metrics, have no line"


def _all_missing(steps: range, there: Sequence[int], newest: int) -> bool:
    """Return whether all of these steps are known to be done, and none of them is `there`."""
    if not steps:
        return True
    return steps[-1] <= newest and bisect_left(there, steps[0]) == bisect_right(there, steps[-1])


def _steps(count: int, first: int) -> str:
    """`3 steps, the first is 31,`."""
    return f"step {first}" if count == 1 else f"{counted(count, 'step')}, the first is {first},"
