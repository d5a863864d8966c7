"""Restart boundaries of a series: do the steps that were done twice have the same bits?

- A resumed attempt computes steps again that an earlier one has recorded. From the same state they
  are the same, to the bit. A tolerance cannot replace that: two recordings of one run on the same
  kind of machine were seen to differ by hundredths of a nat.
- Weights alone give the right loss once: the first step's loss depends on the weights only, the
  second's on the moments, the step count and the master weights too. So `lost_state` is a first
  step that is equal and a second that is not.

Alternatives considered:
- The jump of the loss at a restart: most lost states cost less than the noise of a step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from spike_search.series import Attempt, Row, Series

VERDICTS = {
    "equal": "every step that was done twice is the same",
    "one_step": "one step overlaps: it proves the weights, and nothing else",
    "lost_state": "the first step is equal and the second is not: moments, step count or master "
    "weights were lost",
    "differs_later": "equal for some steps: the run is not deterministic, or state that matters "
    "later was lost",
    "differs_at_once": "the first step differs: other weights, other data or other arithmetic",
    "no_overlap": "no step was done twice: nothing can be said",
}


@dataclass(frozen=True)
class Boundary:
    """The start of an attempt, beside an earlier record of the same steps."""

    attempt: str
    before: str | None
    """Attempt that it is compared with."""
    first_step: int
    overlap: int
    """Steps on record in both."""
    verdict: str
    equal_steps: int = 0
    first_difference: int | None = None
    column: str | None = None
    size: float | None = None
    """Difference there, in nat for the loss."""
    loss_there: float | None = None
    largest: float | None = None
    """Largest difference of the loss in the overlap, and its step."""
    largest_at: int | None = None
    last: float | None = None
    """Difference of the loss at the last step of the overlap."""

    def row(self) -> dict[str, Any]:
        """Return the keys of its line."""
        facts = {key: value for key, value in asdict(self).items() if value is not None}
        del facts["attempt"]
        return {"attempt": self.attempt, **facts, "meaning": VERDICTS[self.verdict]}


def boundaries(series: Series) -> Iterator[Boundary]:
    """Yield the boundary of each attempt but the first."""
    for index, attempt in enumerate(series.attempts[1:], 1):
        before = _record_of(series.attempts[:index], attempt.first)
        if before is None:
            yield Boundary(attempt.name, None, attempt.first, 0, "no_overlap")
        else:
            yield compare(before, attempt)


def _record_of(attempts: Sequence[Attempt], step: int) -> Attempt | None:
    """Return the newest attempt that has recorded a step."""
    return next((one for one in reversed(attempts) if one.first <= step <= one.last), None)


def compare(before: Attempt, attempt: Attempt) -> Boundary:
    """Compare the steps that two attempts have both recorded."""
    known = {row.step: row for row in before.rows if row.step >= attempt.first}
    both = [(known[row.step], row) for row in attempt.rows if row.step in known]
    if not both:
        return Boundary(attempt.name, before.name, attempt.first, 0, "no_overlap")

    sizes = [(abs(now.loss - then.loss), now.step) for then, now in both]
    largest, at = max(sizes, key=lambda one: (_ordered(one[0]), -one[1]))
    columns = [first_column(then, now) for then, now in both]
    equal = next((i for i, column in enumerate(columns) if column), len(both))
    found = Boundary(
        attempt.name,
        before.name,
        attempt.first,
        overlap=len(both),
        verdict="equal" if len(both) > 1 else "one_step",
        equal_steps=equal,
        largest=largest,
        largest_at=at,
    )
    if equal == len(both):
        return found

    then, now = both[equal]
    return replace(
        found,
        verdict={0: "differs_at_once", 1: "lost_state"}.get(equal, "differs_later"),
        first_difference=now.step,
        column=columns[equal],
        size=abs(getattr(now, columns[equal]) - getattr(then, columns[equal])),
        loss_there=now.loss,
        last=sizes[-1][0],
    )


def first_column(then: Row, now: Row) -> str:
    """Return the first column in which two records of a step differ; "" if none does."""
    for column in ("loss", "grad_norm", "update_norm"):
        a, b = getattr(then, column), getattr(now, column)
        # Not a number is equal to itself here.
        if a is not None and b is not None and a != b and not (a != a and b != b):
            return column
    return ""


def _ordered(size: float) -> float:
    return float("inf") if size != size else size
