"""Verdicts of the spike detector, and the event that is open until one of them ends it.

- A verdict is plain numbers. Its `row` holds what is known, under the names of the ledger.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from k2train.guard.robust_baseline import Finite, Level, LogNorm, Spread
from k2train.json_record import Count, Positive

Kind = Literal["opened", "restart", "benign", "malignant", "level", "drift"]
CHANNELS = ("loss", "grad_norm", "update_norm")
KEPT = 50
"""Newest steps of an open event whose values are kept."""
QUIET_Z = 2.0


@dataclass(frozen=True)
class Reference:
    """What was usual before an event: medians and spreads of the loss and of the logs of norms.

    None for a norm that the series does not have, or not for long enough.
    """

    loss: Finite
    loss_sd: Spread
    log_grad: LogNorm | None
    log_grad_sd: Spread | None
    log_update: LogNorm | None = None
    log_update_sd: Spread | None = None

    @classmethod
    def of(cls, loss: Level, grad: Level | None, update: Level | None) -> "Reference":
        """Make it of the baselines of the channels."""
        return cls(
            loss.median,
            loss.sd,
            None if grad is None else grad.median,
            None if grad is None else grad.sd,
            None if update is None else update.median,
            None if update is None else update.sd,
        )

    def z(self, values: "Values") -> tuple[float, float | None, float | None]:
        """How many spreads the channels of a step are above what is usual, in their order."""
        grad, update = values.log_grad, values.log_update
        return (
            (values.loss - self.loss) / self.loss_sd,
            None
            if grad is None or self.log_grad is None or self.log_grad_sd is None
            else (grad - self.log_grad) / self.log_grad_sd,
            None
            if update is None or self.log_update is None or self.log_update_sd is None
            else (update - self.log_update) / self.log_update_sd,
        )


class Values(NamedTuple):
    """The channels of one step; a norm that is not known is None."""

    loss: float
    log_grad: float | None = None
    log_update: float | None = None

    @classmethod
    def of(cls, loss: float, grad: float | None, update: float | None) -> "Values | None":
        """Return the channels of a step, norms as logarithms; None when one is not finite."""
        if not math.isfinite(loss) or not (grad is None or math.isfinite(grad)):
            return None
        if not (update is None or math.isfinite(update)):
            return None
        return cls(float(loss), _log(grad), _log(update))


def _log(norm: float | None) -> float | None:
    return None if norm is None else math.log(max(float(norm), 1e-30))


@dataclass(frozen=True, kw_only=True)
class SpikeVerdict:
    """What a step opened, closed or warned of.

    - `opened`: the loss or a norm jumped; `restart`: within the first steps of an attempt.
    - `benign`: the loss is back; `malignant`: it stays high; `level`: it stays near.
    - `drift`: the loss rises slowly, without a jump.
    """

    kind: Kind
    step: int
    """Step of the verdict."""
    onset: int
    """First step that was unusual."""
    steps: int
    """Steps from the alarm to the verdict, both counted."""
    usual_loss: float
    channels: tuple[str, ...] = ()
    """Channels that raised the alarm: `loss`, `grad_norm`, `update_norm`."""
    in_restart: bool = False
    """Whether what ends here was opened by a `restart`."""
    loss: float | None = None
    grad_norm: float | None = None
    update_norm: float | None = None
    loss_z: float | None = None
    grad_norm_z: float | None = None
    update_norm_z: float | None = None
    peak_loss: float | None = None
    peak_grad_norm: float | None = None
    peak_update_norm: float | None = None
    usual_loss_sd: float | None = None
    usual_grad_norm: float | None = None
    usual_update_norm: float | None = None
    recent_loss: float | None = None
    quiet_share: float | None = None
    """Share of the steps whose gradient norm is nearly usual although the loss is high."""

    def row(self) -> dict[str, Any]:
        """Return what is known, as the keys of a ledger event."""
        row = {key: value for key, value in asdict(self).items() if value is not None}
        if not self.in_restart:
            del row["in_restart"]
        return row

    def sentence(self, loss: float, grad_norm: float) -> str:
        """Say it on the console, with the loss and the gradient norm of the verdict's step."""
        now = f"loss {loss:.4f}, grad_norm {grad_norm:.3g}"
        if self.kind == "drift":
            return (
                f"loss drift at step {self.step}: {self.usual_loss:.4f} -> {self.recent_loss:.4f} "
                f"since about step {self.onset}, without a jump"
            )
        if self.kind == "restart":
            return (
                f"spike restart at step {self.step}: {now}, usual {self.usual_loss:.4f}; it began "
                "with this start, so what was loaded is suspected, and no data"
            )
        return f"spike {self.kind} at step {self.step}: {now}"


def per_rate(update_norm: float | None, lr: float | None) -> float | None:
    """Update norm per learning rate, as the detector takes it; without a rate the norm itself."""
    if update_norm is None or lr is None or not lr > 0.0:
        return update_norm
    return update_norm / lr


@dataclass
class OpenEvent:
    """An event that has begun: its first step, what was usual, and its steps so far."""

    onset: Positive
    center: Reference
    losses: list[Finite]
    """Of the last `KEPT` steps, like the norms as far as they are known."""
    log_grads: list[LogNorm]
    count: Positive
    quiet: Count
    """Steps whose gradient norm is nearly usual although the loss is high."""
    peak_loss: Finite
    peak_log_grad: LogNorm | None
    log_updates: list[LogNorm] = field(default_factory=list)
    peak_log_update: LogNorm | None = None
    restart: bool = False
    channels: tuple[str, ...] = ()
    gradual: bool = False
    """Whether it took many steps from the first unusual one to the alarm: no jump, but a drift."""

    def __post_init__(self) -> None:
        kept = min(self.count, KEPT)
        norms = max(len(self.log_grads), len(self.log_updates))
        if len(self.losses) != kept or norms > kept or self.quiet > self.count:
            raise ValueError(
                f"an open event of {self.count} steps has {len(self.losses)} losses, "
                f"{norms} norms and {self.quiet} quiet steps"
            )

    def add(self, values: Values) -> None:
        """Count one more step."""
        self.losses = [*self.losses, values.loss][-KEPT:]
        self.count += 1
        self.peak_loss = max(self.peak_loss, values.loss)

        _, grad_z, _ = self.center.z(values)
        self.quiet += grad_z is not None and grad_z < QUIET_Z
        if values.log_grad is not None:
            self.log_grads = [*self.log_grads, values.log_grad][-KEPT:]
            self.peak_log_grad = _highest(self.peak_log_grad, values.log_grad)
        if values.log_update is not None:
            self.log_updates = [*self.log_updates, values.log_update][-KEPT:]
            self.peak_log_update = _highest(self.peak_log_update, values.log_update)

    def opening(self, step: int, values: Values) -> SpikeVerdict:
        """Return the verdict of the step that raised the alarm."""
        loss_z, grad_z, update_z = self.center.z(values)
        return replace(
            self._verdict("restart" if self.restart else "opened", step),
            loss=values.loss,
            grad_norm=_norm(values.log_grad),
            update_norm=_norm(values.log_update),
            loss_z=loss_z,
            grad_norm_z=grad_z,
            update_norm_z=update_z,
        )

    def closing(self, kind: Kind, step: int, recent_loss: float) -> SpikeVerdict:
        """Return the verdict that ends the event."""
        return replace(
            self._verdict(kind, step),
            in_restart=self.restart,
            peak_loss=self.peak_loss,
            peak_grad_norm=_norm(self.peak_log_grad),
            peak_update_norm=_norm(self.peak_log_update),
            recent_loss=recent_loss,
            # Small norms inside a long spike: clipping no longer holds the model back, it settles
            # at the worse level.
            quiet_share=self.quiet / self.count if self.log_grads else None,
        )

    def _verdict(self, kind: Kind, step: int) -> SpikeVerdict:
        return SpikeVerdict(
            kind=kind,
            step=step,
            onset=self.onset,
            steps=self.count,
            channels=self.channels,
            usual_loss=self.center.loss,
            usual_loss_sd=self.center.loss_sd,
            usual_grad_norm=_norm(self.center.log_grad),
            usual_update_norm=_norm(self.center.log_update),
        )


def _highest(peak: float | None, value: float) -> float:
    # The logarithm of a norm of 1 is 0.
    return value if peak is None else max(peak, value)


def _norm(log_norm: float | None) -> float | None:
    return None if log_norm is None else math.exp(log_norm)


def raised(z: Sequence[float | None], limits: Sequence[float]) -> tuple[str, ...]:
    """Return the channels whose z is above their limit."""
    return tuple(
        name
        for name, value, limit in zip(CHANNELS, z, limits, strict=True)
        if value is not None and value > limit
    )
