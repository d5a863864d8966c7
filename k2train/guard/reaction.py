"""State of the reaction to spikes: steps left out in a row, and a return that is still to come.

- Saved in the checkpoint, so a run that is killed on a spiked branch ends the branch at the same
  step, and goes back alike.
- Several outliers in a row are no outliers: the alarm does not end by leaving steps out, and the
  run would stand still.

Alternatives considered:
- Counting in the detector: its state is that of accepted steps, and the same for every policy.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from k2train.json_record import Count, Positive


@dataclass
class OutlierCounter:
    """Counts steps that were left out as outliers; `limit` in a row stop the run.

    A public benign spike lasts less than 20 steps, and each step that is left out leaves the next
    one the same weights.
    """

    limit: ClassVar[int] = 20
    in_a_row: Count = 0
    total: Count = 0

    def observe(self, outlier: bool) -> bool:
        """Count a step; returns whether the run must stop, also if it was let go on before."""
        self.in_a_row = self.in_a_row + 1 if outlier else 0
        self.total += int(outlier)
        return outlier and self.in_a_row % self.limit == 0


@dataclass
class Return:
    """A return to an earlier checkpoint, or a stop, decided for the end of step `until`."""

    verdict: str
    onset: Positive
    until: Positive

    def __post_init__(self) -> None:
        if self.until < self.onset:
            raise ValueError(f"a return at step {self.until} is before its onset, {self.onset}")


@dataclass
class Reaction:
    """What the policy has begun."""

    outliers: OutlierCounter = field(default_factory=OutlierCounter)
    to_return: Return | None = None

    def contradiction(self, step: int) -> str:
        """Say what cannot be true after `step` steps; "" if all can."""
        if not self.outliers.in_a_row <= self.outliers.total <= step:
            return (
                f"guard.reaction.outliers counts {self.outliers.in_a_row} steps in a row and "
                f"{self.outliers.total} in all, of {step}"
            )
        if self.to_return is not None and self.to_return.onset > step:
            return f"guard.reaction.to_return.onset ({self.to_return.onset}) is after step {step}"
        return ""
