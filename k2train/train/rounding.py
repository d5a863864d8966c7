"""Bound on what rounding may change in the steps of a replay on another layout.

- Another tensor or data degree adds the same numbers in another order. Nothing else may differ.
- The bound grows with the number of steps since the checkpoint: each update passes its rounding
  errors on to all later ones.

Alternatives considered:
- A fixed tolerance: wide enough for the last step of a chunk, it accepts a wrong first step.
"""

from typing import NamedTuple


class Rounding(NamedTuple):
    """Rounding of a run in one precision."""

    precision: str

    def bound(self, name: str, after: int) -> float:
        """Largest relative change of `loss` or `grad_norm` in step number `after` from a load."""
        return FIRST[self.precision][name] + PER_STEP[self.precision][name] * (after - 1)


FIRST = {
    "fp32": {"loss": 2e-6, "grad_norm": 2e-5},
    "bf16": {"loss": 5e-4, "grad_norm": 5e-3},
}
"""Bound of the first step, whose weights are the same."""
PER_STEP = {
    "fp32": {"loss": 2e-6, "grad_norm": 2e-5},
    "bf16": {"loss": 1e-4, "grad_norm": 1e-3},
}
"""What each later step adds."""
STATE_BOUND = {
    "fp32": {"master": 1e-3, "exp_avg": 1e-2, "exp_avg_sq": 1e-2},
    "bf16": {"master": 0.2, "exp_avg": 0.4, "exp_avg_sq": 0.4},
}
"""Largest relative distance of a tensor after a chunk, by state; one that is lost is at 1."""
