"""Steps whose loss or gradient is not finite: skip them, and stop when they come in a row.

One bad step is data or luck and is left out of the weights; several in a row mean that the weights themselves are
damaged, and every further step only burns time. Multiplying the update by zero instead of skipping is refused:
0 * nan is nan. Every rank feeds the same, already reduced, answer, so every rank takes the same decision.
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
        """`apply` for a finite step, else `skip`, or `stop` from the `limit`-th in a row on."""
        if finite:
            self.in_a_row = 0
            return "apply"
        self.in_a_row += 1
        self.total += 1
        return "stop" if self.in_a_row >= self.limit else "skip"

    def state(self) -> dict[str, int]:
        """Plain JSON for a checkpoint: a restart between two bad steps must not forget the first."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue from `state()`."""
        self.in_a_row = int(state["in_a_row"])
        self.total = int(state["total"])
