"""Expectations of changes by hand, measured when their time comes and recorded with the outcome.

- The pending ones are read from the ledger, so restarts and steps back change nothing about them.
- Loss and gradient norm are the median of the last applied steps up to the due one: one step is
  noise. They are read from `metrics.jsonl`, so a restart in between gives the same number.
- The held-out loss is that of the last evaluation between the change and the due step, or else of
  the next one after it.

Alternatives considered:
- Met as soon as one step is in the bounds: noise alone then meets most expectations.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.data.held_out import OWN
from k2train.errors import RunError
from k2train.expectation import HELD_OUT, LOSS
from k2train.guard.stop_signals import StopRequest
from k2train.record.change_events import Outcome
from k2train.record.changes import Pending, outcome_text, pending_expectations
from k2train.record.event import Event
from k2train.record.events import Entry, Finished, Resumed, of_kind
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord, checked_records
from k2train.record.recent_steps import recent_steps
from k2train.retry import exists_retried
from k2train.train.preflight import Start
from k2train.train.rank_zero_logger import RankZeroRunLogger

MEDIAN_STEPS = 20
"""Steps whose median is the loss or the gradient norm at the last of them."""


class ExpectingRunLogger(RankZeroRunLogger):
    """Logger that compares what it records with what was expected."""

    def __init__(self, start: Start, stop: StopRequest | None = None, device: str = ""):
        super().__init__(start, stop, device)
        self._total_steps = start.order.total_steps
        self._scores = _own_scores(self.held_out.path, self.ledger.entries)
        """Step -> held-out loss of the run's own data."""
        self._pending: list[Pending] = []
        self._events = -1
        """Events of the ledger when the pending expectations were read from it."""

    def event(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._judge(event.step, at_end=True)
        super().event(event)

    def step(self, record: StepRecord) -> None:
        super().step(record)
        # Scores of this step or later are of weights that were given up.
        self._scores = {at: loss for at, loss in self._scores.items() if at < record.step}
        self._judge(record.step)

    def scores(self, step: int, scores: Sequence[HeldOutFacts], seconds: float) -> None:
        super().scores(step, scores, seconds)
        for score in scores:
            if score.name == OWN:
                self._scores[step] = score.loss
        self._judge(step)

    def _judge(self, step: int, at_end: bool = False) -> None:
        """Record the outcome of every expectation whose time has come with `step`."""
        for one in self._read_pending():
            due = one.due_step(self._total_steps)
            if step < due and not at_end:
                continue
            if one.expectation.measure == HELD_OUT:
                found = self._held_out(one, due, step)
            else:
                found = self._median(one, min(due, step))
            if found is None and one.expectation.measure == HELD_OUT and not at_end:
                continue

            at, value = found or (None, None)
            outcome = Outcome(
                attempt=self.attempt,
                step=step,
                expect=one.text,
                stated_step=one.stated_step,
                due_step=due,
                measured_step=at,
                value=value,
                met=None if value is None else one.expectation.is_met_by(value),
            )
            super().event(outcome)
            self.info(outcome_text(outcome))

    def _read_pending(self) -> list[Pending]:
        """Return the pending expectations; the ledger is read again where it has grown."""
        events = self.ledger.head.events
        if events != self._events:
            self._pending, self._events = pending_expectations(self.ledger.entries), events
        return self._pending

    def _held_out(self, one: Pending, due: int, step: int) -> tuple[int, float] | None:
        """Return the step of the evaluation that counts, and its loss; None where there is none.

        At the due step itself the evaluation is still to come, if there is one.
        """
        known = sorted(at for at in self._scores if at > one.stated_step)
        before = [at for at in known if at <= due]
        if due in before or (before and step > due):
            return before[-1], self._scores[before[-1]]
        return (known[0], self._scores[known[0]]) if known and known[0] > due else None

    def _median(self, one: Pending, due: int) -> tuple[int, float] | None:
        """Return the last step that counts, and the median up to it; None if none was applied."""
        first = max(one.stated_step, due - MEDIAN_STEPS) + 1
        rows = [row for row in recent_steps(self.metrics.path, first, due) if row.applied]
        is_loss = one.expectation.measure == LOSS
        values = [row.loss if is_loss else row.grad_norm for row in rows]
        if not values:
            return None
        return rows[-1].step, median(values) if all(map(math.isfinite, values)) else math.nan


def _own_scores(path: Path, entries: Sequence[Entry]) -> dict[int, float]:
    """Scores of the weights that were not given up, by their steps."""
    if not exists_retried(path):
        return {}
    began = [(start.attempt, start.step) for start in of_kind(entries, Resumed)]
    rows = [row for _, row in checked_records(path, HeldOutRecord) if not isinstance(row, RunError)]
    return {
        row.step: row.loss
        for row in rows
        if row.set == OWN
        # A later start may have had its scores at other steps: chunks were moved.
        and not any(row.attempt < attempt and row.step > step for attempt, step in began)
    }
