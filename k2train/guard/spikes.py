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
from dataclasses import dataclass, field
from statistics import median
from typing import Any

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


@dataclass
class SpikeAlert:
    """Detects loss spikes: `observe` returns the events that a step opened or closed.

    Its fields are plain JSON for a checkpoint: a restart raises the same alarms.
    """

    losses: list[float] = field(default_factory=list)
    log_grads: list[float] = field(default_factory=list)
    open: dict[str, Any] | None = None
    """The open event and its frozen reference."""

    @property
    def open_since(self) -> int | None:
        """First step of the open event, or None. Checkpoints from before it are worth keeping."""
        return None if self.open is None else int(self.open["onset"])

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
            return self._continue_event(step, loss, log_grad)

        if len(self.losses) >= ARMED_AT:
            loss_median, loss_sd = _center_and_spread(self.losses, LOSS_FLOOR_NAT)
            grad_median, grad_sd = _center_and_spread(self.log_grads, LOG_GRAD_FLOOR)

            loss_z = (loss - loss_median) / loss_sd
            grad_z = (log_grad - grad_median) / grad_sd
            if loss_z > LOSS_Z or grad_z > GRAD_Z:
                # The frozen reference of the event, from before its first step.
                center = {
                    "loss": loss_median,
                    "loss_sd": loss_sd,
                    "log_grad": grad_median,
                    "log_grad_sd": grad_sd,
                }
                self.open = {
                    "onset": step,
                    "center": center,
                    "losses": [],
                    "log_grads": [],
                    "count": 0,
                    "quiet": 0,
                }
                self.open |= {"peak_loss": loss, "peak_log_grad": log_grad}
                self._add_to_event(loss, log_grad)

                return [self._opening_event(step, loss, log_grad, loss_z, grad_z)]

        self._accept(loss, log_grad)
        return []

    def _accept(self, loss: float, log_grad: float) -> None:
        self.losses = [*self.losses, loss][-WINDOW:]
        self.log_grads = [*self.log_grads, log_grad][-WINDOW:]

    def _add_to_event(self, loss: float, log_grad: float) -> None:
        event = self.open
        assert event is not None, "no event is open"
        center = event["center"]
        event["losses"] = [*event["losses"], loss][-CLASSIFY_RECENT:]
        event["log_grads"] = [*event["log_grads"], log_grad][-CLASSIFY_RECENT:]
        event["count"] += 1

        # Counts steps whose gradient norm is nearly usual although the loss is high.
        event["quiet"] += (log_grad - center["log_grad"]) / center["log_grad_sd"] < QUIET_Z
        event["peak_loss"] = max(event["peak_loss"], loss)
        event["peak_log_grad"] = max(event["peak_log_grad"], log_grad)

    def _continue_event(self, step: int, loss: float, log_grad: float) -> list[dict[str, Any]]:
        self._add_to_event(loss, log_grad)
        event = self.open
        assert event is not None, "no event is open"
        center, losses = event["center"], event["losses"]
        returned = center["loss"] + RETURNED_SD * center["loss_sd"]
        if len(losses) >= RETURNED_STEPS and median(losses[-RETURNED_STEPS:]) <= returned:
            return self._close_event("benign", step)
        if event["count"] < CLASSIFY_STEPS:
            return []

        high = center["loss"] + CLASSIFY_SD * center["loss_sd"]
        kind = "malignant" if median(losses) > high else "level"

        closed = self._close_event(kind, step)

        # Training continues at the new level. Compared with the old one, every further step would
        # raise an alarm.
        self.losses, self.log_grads = list(losses), list(event["log_grads"])

        return closed

    def _opening_event(
        self, step: int, loss: float, log_grad: float, loss_z: float, grad_z: float
    ) -> dict[str, Any]:
        assert self.open is not None, "no event is open"
        center = self.open["center"]
        return {
            "kind": "opened",
            "step": step,
            "loss": loss,
            "grad_norm": math.exp(log_grad),
            "loss_z": loss_z,
            "grad_norm_z": grad_z,
            "usual_loss": center["loss"],
            "usual_grad_norm": math.exp(center["log_grad"]),
        }

    def _close_event(self, kind: str, step: int) -> list[dict[str, Any]]:
        event = self.open
        assert event is not None, "no event is open"
        self.open = None
        return [
            {
                "kind": kind,
                "step": step,
                "onset": event["onset"],
                "steps": event["count"],
                "peak_loss": event["peak_loss"],
                "peak_grad_norm": math.exp(event["peak_log_grad"]),
                "usual_loss": event["center"]["loss"],
                "recent_loss": median(event["losses"]),
                # Small norms inside a long spike: clipping no longer holds the model back, it
                # settles at the worse level.
                "quiet_share": event["quiet"] / event["count"],
            }
        ]


def _center_and_spread(values: list[float], floor: float) -> tuple[float, float]:
    center = median(values)
    return center, max(MAD_TO_SD * median(abs(value - center) for value in values), floor)
