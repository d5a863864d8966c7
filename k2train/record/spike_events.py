"""Ledger event of the spike detector: what a step opened, closed or warned of.

- Readers import it from `k2train.record.events`, like every other event.
"""

from k2train.record.event import Event


class Spike(Event, name="spike"):
    """A spike of the loss `opened`, or was closed as benign, malignant or level.

    `restart` is an opening within the first steps of an attempt, `drift` a slow rise. `channels`
    are those that raised the alarm; `in_restart` marks the end of what a restart opened.
    """

    attempt: int
    policy: str
    kind: str
    step: int
    loss: float | None = None
    grad_norm: float | None = None
    update_norm: float | None = None
    loss_z: float | None = None
    grad_norm_z: float | None = None
    update_norm_z: float | None = None
    onset: int | None = None
    steps: int | None = None
    peak_loss: float | None = None
    peak_grad_norm: float | None = None
    peak_update_norm: float | None = None
    usual_loss: float
    usual_loss_sd: float | None = None
    usual_grad_norm: float | None = None
    usual_update_norm: float | None = None
    recent_loss: float | None = None
    quiet_share: float | None = None
    channels: tuple[str, ...] | None = None
    in_restart: bool | None = None
