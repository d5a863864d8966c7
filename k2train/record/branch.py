"""Steps and scores of a run without what was undone: the branch that its last start continues.

- A start that continues after step N undoes the rows after it of all earlier starts, also those
  that it has not reached itself yet.
"""

from collections.abc import Iterable
from typing import TypeVar

from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import Record

R = TypeVar("R", bound=Record)


class Starts:
    """Where the starts of a run began, by the steps that they recorded."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._first: dict[int, int] = {}
        self.last_step = 0
        """Last step of the run as it is now."""
        for record in records:
            self._first.setdefault(record.attempt, record.step)
            self.last_step = record.step

    def undid(self, attempt: int, step: int) -> bool:
        """Whether a later start began at this step of a start, or before it."""
        return any(later > attempt and first <= step for later, first in self._first.items())

    def scores(self, scores: Iterable[HeldOutRecord]) -> list[HeldOutRecord]:
        """Return the last score of each set after each step that was not undone."""
        found = {
            (score.step, score.set): score
            for score in scores
            if score.step <= self.last_step and not self.undid(score.attempt, score.step)
        }
        return [found[key] for key in sorted(found)]


def branch(records: Iterable[R]) -> list[R]:
    """Return the records that were not undone, by step; those of one step in their order."""
    kept: dict[int, list[R]] = {}
    attempt = -1
    for record in records:
        if record.attempt > attempt:
            attempt = record.attempt
            kept = {step: rows for step, rows in kept.items() if step < record.step}
        kept.setdefault(record.step, []).append(record)
    return [record for step in sorted(kept) for record in kept[step]]
