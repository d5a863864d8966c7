"""Non-finite steps: skip a step whose loss or gradient is not finite, stop after several in a row.

- One bad step is data or chance and is left out of the weights. Several in a row mean that the
  weights themselves are damaged, and every further step only wastes time.
- Every rank observes the same reduced value, so every rank takes the same decision.

Alternatives considered:
- Multiplying the update by zero instead of skipping it: 0 * nan is nan.
"""

from typing import Literal

Decision = Literal["apply", "skip", "stop"]


class NonFiniteCounter:
    """Counts non-finite steps; `limit` in a row stop the run."""

    def __init__(self, limit: int = 3) -> None:
        assert limit >= 1, f"limit must be at least 1, got {limit}"
        self.limit = limit
        self.in_a_row = 0
        self.total = 0

    def observe(self, finite: bool) -> Decision:
        """Return `apply` for a finite step, else `skip`, or `stop` from the `limit`-th in a row."""
        if finite:
            self.in_a_row = 0
            return "apply"
        self.in_a_row += 1
        self.total += 1
        return "stop" if self.in_a_row >= self.limit else "skip"

    def state(self) -> dict[str, int]:
        """Plain JSON for a checkpoint, so that a restart between two bad steps counts both."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state(self, state: dict[str, int]) -> None:
        """Restore from `state()`."""
        self.in_a_row = int(state["in_a_row"])
        self.total = int(state["total"])
