"""Loss-spike detection: robust z-scores of the loss, the log gradient norm and log update norm.

- A step is compared with the median and the median absolute deviation of the last 256 accepted
  steps, brought up to date every 16 of them, never with a window that contains the step itself.
- An outlier opens an event and freezes the windows. In the first 8 steps of an attempt it is a
  `restart`: what was loaded is suspected, and no data.
- An event ends as `benign` (the loss returned), `malignant` (after 100 steps still high and not on
  its way back: the model is damaged; or far too low: the data is no text) or `level` (near after
  100 steps: the data changed).
- `drift` warns of a slow rise without a jump.
- This module only reports; the caller decides what to do.
- All arithmetic is Python floats in a fixed order. Ranks that observe the same numbers, or a
  restart that loads the state, get the same events.
- Non-finite values are ignored here. They are counted elsewhere and must not enter a median.

Alternatives considered:
- Mean and standard deviation over a window that includes the spike: the first bad steps then hide
  the rest.
"""

from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from k2train.guard.drift import Drift, Rise
from k2train.guard.robust_baseline import WINDOW, Finite, LogNorm, baseline
from k2train.guard.spike_verdict import OpenEvent, Reference, SpikeVerdict, Values, raised
from k2train.json_record import Count

REFRESH = 16
"""Accepted steps after which the baseline is brought up to date."""
LIMITS = (7.0, 8.0, 8.0)
"""z of loss, gradient norm and update norm that raise an alarm."""
RAISED = (3.0, 4.0, 4.0)
"""z of a step that belongs to an alarm which follows it at once."""
LOSS_FLOOR_NAT = 1e-3
LOG_NORM_FLOOR = 0.05
RETURNED_STEPS = 20
RETURNED_SD = 2.0
CLASSIFY_STEPS = 100
RECOVERING_LIMIT = 3
"""Times the usual steps after which an event still on its way back is malignant all the same."""
RECOVERING = 0.8
"""Share of the excess that a quarter of `CLASSIFY_STEPS` leaves of it on the way back."""
RECOVERING_SD = 0.5
"""What noise may add to that share, in spreads of the loss."""
JUST_BACK = 5
BELOW_SD = 10.0
LOW_NAT = 0.3
"""Spreads and nat below what was usual, at the most, of a loss that is back."""
LOW = 0.5
"""Share of what was usual under which a loss is that of rows which any model guesses."""
HIGH_SD = 3.0
HIGH_NAT = 0.1
"""Least lasting rise, in nat, that is called damage."""
FEWEST_RECORDS = 40
"""Records of an event before it is classified, where not every step is on record."""
GRADUAL_STEPS = 400
"""Steps from the first unusual one to the alarm, from which on there was no jump."""
RESTART_STEPS = 8
RESTART_LEVEL_STEPS = 16
RESTART_LEVEL_SD = 2.5
RESTART_LEVEL_NAT = 0.025
"""How far the median of an attempt's first 16 losses may be above what was usual."""


Ending = Literal["benign", "malignant", "level", "drift"]


@dataclass
class SpikeAlert:
    """Detects loss spikes: `observe` returns the verdicts of a step.

    Its fields are plain JSON for a checkpoint: a restart raises the same alarms.
    """

    losses: list[Finite] = field(default_factory=list)
    log_grads: list[LogNorm] = field(default_factory=list)
    open: OpenEvent | None = None
    """The open event and its frozen reference."""
    log_updates: list[LogNorm] = field(default_factory=list)
    usual: Reference | None = None
    """The baseline, None before there are enough steps for one."""
    accepted: Count = 0
    """Steps accepted since the baseline was brought up to date."""
    unusual_since: Count | None = None
    """First of the raised steps in a row that end with the last one."""
    drift: Drift = field(default_factory=Drift)

    def __post_init__(self) -> None:
        norms = max(len(self.log_grads), len(self.log_updates))
        if not norms <= len(self.losses) <= WINDOW:
            raise ValueError(
                f"a window of {WINDOW} steps has {len(self.losses)} losses and {norms} norms"
            )

        self.stride = 1
        """Steps from one observed step to the next; counts are of observed ones."""
        # Of this attempt alone, and therefore no part of a checkpoint.
        self._attempt_start: int | None = None
        self._attempt_losses: list[float] = []
        self._attempt_usual: Reference | None = None

    @property
    def open_since(self) -> int | None:
        """First step of the open event, or None. Checkpoints from before it are worth keeping."""
        return None if self.open is None else self.open.onset

    def attempt_began(self, first_step: int) -> None:
        """Take note that an attempt begins, with this step."""
        self._attempt_start, self._attempt_losses = first_step, []
        # What was open before it began is not of its making.
        self._attempt_usual = None if self.open else self.usual or self._baseline()

    def is_outlier(self, loss: float, grad_norm: float | None = None) -> bool:
        """Whether a step would raise an alarm by these values; during an event, one more time.

        Changes nothing: asked before an update is applied.
        """
        values = Values.of(loss, grad_norm, None)
        usual = self.open.center if self.open is not None else self.usual or self._baseline()
        return values is not None and usual is not None and bool(raised(usual.z(values), LIMITS))

    def would_open(self, loss: float, grad_norm: float | None = None) -> bool:
        """Whether `observe` would open an event by these values. Changes nothing."""
        return self.open is None and self.is_outlier(loss, grad_norm)

    def observe(
        self,
        step: int,
        loss: float,
        grad_norm: float | None = None,
        update_norm: float | None = None,
    ) -> list[SpikeVerdict]:
        """Observe one applied step; returns its verdicts, mostly none.

        The loss is in nat per token, the gradient norm that before clipping. The update norm is
        best given per learning rate, so that a change of the rate is no alarm.
        """
        values = Values.of(loss, grad_norm, update_norm)
        if values is None:
            return []

        began = self._attempt_start
        if began is not None and len(self._attempt_losses) < RESTART_LEVEL_STEPS:
            self._attempt_losses.append(values.loss)
        if self.open is not None:
            return self._continue_event(self.open, step, values)

        if self.usual is None:
            self._refresh()
        usual = self.usual
        if usual is None:
            self._accept(step, values)
            return []

        loss_z, grad_z, update_z = z = usual.z(values)
        if not (
            loss_z > RAISED[0]
            or (grad_z is not None and grad_z > RAISED[1])
            or (update_z is not None and update_z > RAISED[2])
        ):
            self.unusual_since = None
            found = self._accept(step, values)
            return (
                found if self._attempt_usual is None else found + self._judge_restart(step, values)
            )

        if self.unusual_since is None:
            self.unusual_since = step
        if channels := raised(z, LIMITS):
            near = max(RESTART_STEPS, 2 * self.stride)
            early = began is not None and 0 <= self.unusual_since - began < near
            return [self._open(step, self.unusual_since, usual, values, channels, early)]
        return self._accept(step, values) + self._judge_restart(step, values)

    def _open(
        self,
        step: int,
        onset: int,
        usual: Reference,
        values: Values,
        channels: tuple[str, ...],
        restart: bool,
    ) -> SpikeVerdict:
        self.open = OpenEvent(
            onset, usual, [], [], 0, 0, values.loss, None, restart=restart, channels=channels
        )
        self.open.gradual = step - onset >= GRADUAL_STEPS
        self.unusual_since, self._attempt_usual = None, None
        self.open.add(values)
        return self.open.opening(step, values)

    def _judge_restart(self, step: int, values: Values) -> list[SpikeVerdict]:
        """Look at the first losses of an attempt together: a small loss of state lifts them all."""
        usual, began = self._attempt_usual, self._attempt_start
        if began is None or usual is None or len(self._attempt_losses) < RESTART_LEVEL_STEPS:
            return []

        self._attempt_usual = None
        excess = median(self._attempt_losses) - usual.loss
        if excess <= max(RESTART_LEVEL_SD * usual.loss_sd, RESTART_LEVEL_NAT):
            return []
        return [self._open(step, began, usual, values, ("loss",), restart=True)]

    def _baseline(self) -> Reference | None:
        """Return what is usual now; None before there are enough steps."""
        loss = baseline(self.losses, LOSS_FLOOR_NAT)
        if loss is None:
            return None
        grad, update = (
            baseline(values, LOG_NORM_FLOOR) for values in (self.log_grads, self.log_updates)
        )
        return Reference.of(loss, grad, update)

    def _refresh(self) -> None:
        self.usual, self.accepted = self._baseline(), 0

    def _accept(self, step: int, values: Values) -> list[SpikeVerdict]:
        _push(self.losses, values.loss)
        if values.log_grad is not None:
            _push(self.log_grads, values.log_grad)
        if values.log_update is not None:
            _push(self.log_updates, values.log_update)

        self.accepted += 1
        if self.accepted >= REFRESH and self.usual is not None:
            self._refresh()
        if self.usual is None:
            return []
        rise = self.drift.observe(step, values.loss, self.usual.loss_sd)
        return [] if rise is None else [_drift_verdict(step, rise, self.usual)]

    def _continue_event(self, event: OpenEvent, step: int, values: Values) -> list[SpikeVerdict]:
        event.add(values)
        usual, losses = event.center, event.losses
        returned = usual.loss + RETURNED_SD * usual.loss_sd
        classify = max(CLASSIFY_STEPS // self.stride, min(CLASSIFY_STEPS, FEWEST_RECORDS))
        if len(losses) >= RETURNED_STEPS and median(losses[-RETURNED_STEPS:]) <= returned:
            # A loss that falls through what was usual is not back: look again where it settles.
            lowest = usual.loss - max(BELOW_SD * usual.loss_sd, LOW_NAT)
            if median(losses[-JUST_BACK:]) >= lowest or event.count >= classify:
                low = _too_low(median(losses), usual.loss) and not event.restart
                return [self._close(event, "malignant" if low else "benign", step)]
        if event.count < classify:
            return []

        if event.count < RECOVERING_LIMIT * classify and _recovering(losses, usual, returned):
            return []
        high = max(HIGH_SD * usual.loss_sd, HIGH_NAT)
        if median(losses) - usual.loss <= high:
            return [self._close(event, "level", step)]
        if event.gradual:
            return [self._close(event, "drift", step)]
        return [self._close(event, "level" if event.restart else "malignant", step)]

    def _close(self, event: OpenEvent, kind: Ending, step: int) -> SpikeVerdict:
        self.open = None
        if kind != "benign":
            # Training continues at the new level. Compared with the old one, every further step
            # would raise an alarm.
            self.losses, self.log_grads = [*event.losses], [*event.log_grads]
            self.log_updates = [*event.log_updates]
            self.drift = Drift()
        else:
            # A norm that stays high while the loss is usual is the new level of that norm.
            if _stays_high(event.log_grads, event.center.log_grad, event.center.log_grad_sd):
                self.log_grads = [*event.log_grads]
            if _stays_high(event.log_updates, event.center.log_update, event.center.log_update_sd):
                self.log_updates = [*event.log_updates]
        self._refresh()
        return event.closing(kind, step, median(event.losses))


def _push(window: list[float], value: float) -> None:
    window.append(value)
    if len(window) > WINDOW:
        del window[0]


def _too_low(loss: float, usual: float) -> bool:
    """Whether a loss after an alarm is no return, but that of data which is no text."""
    return loss < LOW * usual and usual - loss > LOW_NAT


def _recovering(losses: list[float], usual: Reference, returned: float) -> bool:
    """Whether the losses of an event, oldest first, are back just now, or on their way."""
    if median(losses[-JUST_BACK:]) <= returned:
        return True
    half = len(losses) // 2
    before, now = median(losses[:half]) - usual.loss, median(losses[half:]) - usual.loss
    return now <= RECOVERING * before + RECOVERING_SD * usual.loss_sd


def _stays_high(log_norms: list[float], usual: float | None, sd: float | None) -> bool:
    if usual is None or sd is None or len(log_norms) < RETURNED_STEPS:
        return False
    return median(log_norms[-RETURNED_STEPS:]) > usual + RAISED[1] * sd


def _drift_verdict(step: int, rise: Rise, usual: Reference) -> SpikeVerdict:
    return SpikeVerdict(
        kind="drift",
        step=step,
        onset=rise.since,
        steps=step - rise.since + 1,
        channels=("loss",),
        usual_loss=rise.usual_loss,
        recent_loss=rise.recent_loss,
    )
