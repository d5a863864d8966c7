"""Result of one training step, equal on every rank: loss, norms, flags, and what became of it.

- The flags of a step are sums over all ranks. Where the step was computed again, each pass has sent
  the same ones, but for value faults, which are counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k2train.fault_injection import VALUES
from k2train.optim.grad_norm import StepSums
from k2train.train.recheck import Judged, Rechecked


@dataclass(frozen=True)
class StepResult:
    """Result of one training step; equal on every rank."""

    loss: float
    grad_norm: float
    norms: Mapping[str, float]
    applied: bool
    """False when loss or gradient were not finite or the gradient too large, or the step raised an
    alarm and is left out for it: no rank changed.
    """
    flags: tuple[float, ...]
    faults: tuple[str, ...] = ()
    """Value faults that some rank made on purpose in this step, by their name."""
    recheck: Rechecked | None = None
    """What doing the step again showed; None if it was not done again."""
    outlier: bool = False
    """Whether the step was not applied because its loss or norm was far from usual."""
    update_norm: float | None = None
    """Norm of the applied update, where `spikes.update_norm` asks for it."""


def result_of(
    judged: Judged, told: Sequence[StepSums], num_flags: int, update_norm: float | None
) -> StepResult:
    """Return the result of a step whose passes exchanged `told`, `num_flags` flags first."""
    sums = judged.sums
    made = [sum(counts) for counts in zip(*(one.flags[num_flags:] for one in told), strict=True)]
    return StepResult(
        sums.loss,
        sums.grad_norm,
        sums.norms,
        judged.applies,
        # A request to stop may come during a later pass.
        tuple(map(max, zip(*(one.flags[:num_flags] for one in told), strict=True))),
        tuple(name for name, count in zip(VALUES, made, strict=True) if count),
        judged.recheck,
        judged.outlier,
        update_norm,
    )
