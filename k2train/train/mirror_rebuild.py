"""Mirrors of a run that is over, from its record alone: rows, scores and events in their order.

- The branch of the last start is written: steps and scores that were undone are left out. Their
  spikes, saves and ends stay, as events.
- Damaged lines of the metrics are left out: the rest is worth more than none.
"""

from pathlib import Path

from k2train.errors import RunError
from k2train.record.branch import Starts, branch
from k2train.record.event import Event
from k2train.record.held_out import HeldOutRecord
from k2train.record.ledger import read_ledger
from k2train.record.metrics import R, StepRecord, checked_records
from k2train.record.mirror import SHOWS_TIME, Mirror
from k2train.retry import is_file_retried


def rebuild(directory: Path, mirror: Mirror) -> tuple[int, int]:
    """Put the record of a run into a mirror; returns the numbers of steps and of scores.

    Raises RunError when the ledger is damaged or there is none.
    """
    entries = read_ledger(directory / "ledger.jsonl")
    records = _records(directory / "metrics.jsonl", StepRecord)
    starts = Starts(records)
    scores = starts.scores(_records(directory / "held_out.jsonl", HeldOutRecord))
    steps = branch(records)

    queue = _Queue(mirror, steps, scores)
    for entry in entries:
        step = _step_of(entry.event)
        undone = step is not None and starts.undid(getattr(entry.event, "attempt", 0), step)
        if step is not None and not undone:
            queue.until(step)
        mirror.replayed(entry.event, entry.time, undone)
    queue.until(starts.last_step)
    return len(steps), len(scores)


class _Queue:
    """Steps and scores that the mirror has not got yet, by step."""

    def __init__(
        self, mirror: Mirror, steps: list[StepRecord], scores: list[HeldOutRecord]
    ) -> None:
        self._mirror = mirror
        self._steps, self._scores = iter(steps), iter(scores)
        self._step, self._score = next(self._steps, None), next(self._scores, None)

    def until(self, last: int) -> None:
        """Hand over all of them up to a step; scores follow the step that they are of."""
        while True:
            step, score = self._step, self._score
            if (
                score is not None
                and score.step <= last
                and (step is None or score.step < step.step)
            ):
                self._mirror.score(score)
                self._score = next(self._scores, None)
            elif step is not None and step.step <= last:
                self._mirror.step(step)
                self._step = next(self._steps, None)
            else:
                return


def _step_of(event: Event) -> int | None:
    """Return the step behind which an event shows the time of the run; None of other events."""
    return event.step if isinstance(event, SHOWS_TIME) else None


def _records(path: Path, kind: type[R]) -> list[R]:
    if not is_file_retried(path):
        return []
    return [found for _, found in checked_records(path, kind) if not isinstance(found, RunError)]
