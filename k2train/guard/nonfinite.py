"""Non-finite steps: skip a step whose loss or gradient is not finite, stop after several in a row.

- One bad step is data or chance and is left out of the weights. Several in a row mean that the
  weights themselves are damaged, and every further step only wastes time.
- Every rank observes the same reduced value, so every rank takes the same decision.

Alternatives considered:
- Multiplying the update by zero instead of skipping it: 0 * nan is nan.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from k2train.json_record import Count

Decision = Literal["apply", "skip", "stop"]


@dataclass
class NonFiniteCounter:
    """Counts non-finite steps; `limit` in a row stop the run, also with a restart between them."""

    limit: ClassVar[int] = 3
    in_a_row: Count = 0
    total: Count = 0

    def observe(self, finite: bool) -> Decision:
        """Return `apply` for a finite step, else `skip`, or `stop` from the `limit`-th in a row."""
        if finite:
            self.in_a_row = 0
            return "apply"
        self.in_a_row += 1
        self.total += 1
        return "stop" if self.in_a_row >= self.limit else "skip"
