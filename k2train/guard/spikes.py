"""Loss-spike detection: robust z-scores of the loss and of the log gradient norm.

- A step is compared with the median and the median absolute deviation of the last 256 accepted
  steps, never with a window that contains the step itself.
- An outlier opens an event and freezes the window.
- An event ends as `benign` (the loss returned), `malignant` (still high after 100 steps: the model
  is damaged) or `level` (near after 100 steps: the data changed).
- This module only reports; the caller decides what to do.
- All arithmetic is Python floats in a fixed order. Ranks that observe the same numbers, or a
  restart that loads the state, get the same events.
- Non-finite values are ignored here. They are counted elsewhere and must not enter a median.

Alternatives considered:
- Mean and standard deviation over a window that includes the spike: the first bad steps then hide
  the rest.
"""

import math
import sys
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

from pydantic import BeforeValidator

from k2train.json_record import Count, Positive

WINDOW = 256
ARMED_AT = 64
LOSS_Z = 7.0
GRAD_Z = 8.0
LOSS_FLOOR_NAT = 1e-3
LOG_GRAD_FLOOR = 0.05
QUIET_Z = 2.0
RETURNED_STEPS = 20
RETURNED_SD = 2.0
CLASSIFY_STEPS = 100
CLASSIFY_RECENT = 50
CLASSIFY_SD = 3.0
# 1 / Phi^-1(3/4): scales the median absolute deviation of a Gaussian to its standard deviation.
MAD_TO_SD = 1.4826


def _finite(value: Any) -> Any:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"must be a number, is {repr(value)[:60]}")
    return value


def _log_of_norm(value: Any) -> Any:
    if _finite(value) > math.log(sys.float_info.max):
        raise ValueError(f"must be the logarithm of a number, is {repr(value)[:60]}")
    return value


def _spread(value: Any) -> Any:
    if _finite(value) <= 0:
        raise ValueError(f"must be a number above 0, is {repr(value)[:60]}")
    return value


# Checked where a state is read from a checkpoint.
Finite = Annotated[float, BeforeValidator(_finite)]
LogNorm = Annotated[float, BeforeValidator(_log_of_norm)]
Spread = Annotated[float, BeforeValidator(_spread)]


@dataclass(frozen=True)
class Reference:
    """What was usual before an event: medians and spreads of loss and log gradient norm."""

    loss: Finite
    loss_sd: Spread
    log_grad: LogNorm
    log_grad_sd: Spread


@dataclass
class OpenEvent:
    """An event that has begun: its first step, what was usual, and its steps so far."""

    onset: Positive
    center: Reference
    losses: list[Finite]
    """Of the last `CLASSIFY_RECENT` steps, like `log_grads`."""
    log_grads: list[LogNorm]
    count: Positive
    quiet: Count
    """Steps whose gradient norm is nearly usual although the loss is high."""
    peak_loss: Finite
    peak_log_grad: LogNorm

    def __post_init__(self) -> None:
        kept = min(self.count, CLASSIFY_RECENT)
        if not len(self.losses) == len(self.log_grads) == kept or self.quiet > self.count:
            raise ValueError(
                f"an open event of {self.count} steps has {len(self.losses)} losses, "
                f"{len(self.log_grads)} norms and {self.quiet} quiet steps"
            )

    def add(self, loss: float, log_grad: float) -> None:
        """Count one more step."""
        self.losses = [*self.losses, loss][-CLASSIFY_RECENT:]
        self.log_grads = [*self.log_grads, log_grad][-CLASSIFY_RECENT:]
        self.count += 1

        usual = self.center
        self.quiet += (log_grad - usual.log_grad) / usual.log_grad_sd < QUIET_Z
        self.peak_loss = max(self.peak_loss, loss)
        self.peak_log_grad = max(self.peak_log_grad, log_grad)


@dataclass
class SpikeAlert:
    """Detects loss spikes: `observe` returns the events that a step opened or closed.

    Its fields are plain JSON for a checkpoint: a restart raises the same alarms.
    """

    losses: list[Finite] = field(default_factory=list)
    log_grads: list[LogNorm] = field(default_factory=list)
    open: OpenEvent | None = None
    """The open event and its frozen reference."""

    def __post_init__(self) -> None:
        if len(self.losses) != len(self.log_grads) or len(self.losses) > WINDOW:
            raise ValueError(
                f"a window of {WINDOW} steps has {len(self.losses)} losses and "
                f"{len(self.log_grads)} norms"
            )

    @property
    def open_since(self) -> int | None:
        """First step of the open event, or None. Checkpoints from before it are worth keeping."""
        return None if self.open is None else self.open.onset

    def observe(self, step: int, loss: float, grad_norm: float) -> list[dict[str, Any]]:
        """Observe one applied step (loss in nat per token, gradient norm before clipping).

        Returns plain JSON events {kind: opened | benign | malignant | level, step, ...}, mostly
        none.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return []

        loss = float(loss)
        log_grad = math.log(max(float(grad_norm), 1e-30))
        if self.open is not None:
            return self._continue_event(self.open, step, loss, log_grad)

        if len(self.losses) >= ARMED_AT:
            loss_median, loss_sd = _center_and_spread(self.losses, LOSS_FLOOR_NAT)
            grad_median, grad_sd = _center_and_spread(self.log_grads, LOG_GRAD_FLOOR)

            loss_z = (loss - loss_median) / loss_sd
            grad_z = (log_grad - grad_median) / grad_sd
            if loss_z > LOSS_Z or grad_z > GRAD_Z:
                # The frozen reference of the event, from before its first step.
                usual = Reference(loss_median, loss_sd, grad_median, grad_sd)
                self.open = OpenEvent(step, usual, [], [], 0, 0, loss, log_grad)
                self.open.add(loss, log_grad)

                return [_opening_event(self.open, loss_z, grad_z)]

        self._accept(loss, log_grad)
        return []

    def _accept(self, loss: float, log_grad: float) -> None:
        self.losses = [*self.losses, loss][-WINDOW:]
        self.log_grads = [*self.log_grads, log_grad][-WINDOW:]

    def _continue_event(
        self, event: OpenEvent, step: int, loss: float, log_grad: float
    ) -> list[dict[str, Any]]:
        event.add(loss, log_grad)
        usual, losses = event.center, event.losses
        returned = usual.loss + RETURNED_SD * usual.loss_sd
        if len(losses) >= RETURNED_STEPS and median(losses[-RETURNED_STEPS:]) <= returned:
            self.open = None
            return [_closing_event(event, "benign", step)]
        if event.count < CLASSIFY_STEPS:
            return []

        high = usual.loss + CLASSIFY_SD * usual.loss_sd
        kind = "malignant" if median(losses) > high else "level"

        # Training continues at the new level. Compared with the old one, every further step would
        # raise an alarm.
        self.losses, self.log_grads = list(losses), list(event.log_grads)
        self.open = None

        return [_closing_event(event, kind, step)]


def _opening_event(event: OpenEvent, loss_z: float, grad_z: float) -> dict[str, Any]:
    return {
        "kind": "opened",
        "step": event.onset,
        "loss": event.peak_loss,
        "grad_norm": math.exp(event.peak_log_grad),
        "loss_z": loss_z,
        "grad_norm_z": grad_z,
        "usual_loss": event.center.loss,
        "usual_grad_norm": math.exp(event.center.log_grad),
    }


def _closing_event(event: OpenEvent, kind: str, step: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "step": step,
        "onset": event.onset,
        "steps": event.count,
        "peak_loss": event.peak_loss,
        "peak_grad_norm": math.exp(event.peak_log_grad),
        "usual_loss": event.center.loss,
        "recent_loss": median(event.losses),
        # Small norms inside a long spike: clipping no longer holds the model back, it settles at
        # the worse level.
        "quiet_share": event.quiet / event.count,
    }


def _center_and_spread(values: list[float], floor: float) -> tuple[float, float]:
    center = median(values)
    return center, max(MAD_TO_SD * median(abs(value - center) for value in values), floor)
