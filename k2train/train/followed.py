"""Steps after a checkpoint: recorded once two are done, and compared when a run does them again.

- A checkpoint with whole weights but without moments, count of updates or master weights passes the
  first step after it and fails the second. Two recorded steps therefore tell a restart that lies.
- Every rank compares the same numbers, which the step's exchange has made equal. So all of them
  stop alike.
- On the same setting (layout, kernels, versions, machine) every bit must be equal. On another one
  the distance is bounded by rounding (`train.rounding`).

Alternatives considered:
- Comparing with the metrics: they hold steps of branches that were given up, and do not say of
  which checkpoint.
- One step: its loss and gradient need the weights alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from k2train.record.events import CheckpointSaved, Entry, Resumed, of_kind
from k2train.record.followed_events import CheckpointFollowed, FollowedStep, ResumeDrilled
from k2train.train.rounding import Rounding

STEPS = 2
"""Steps after each checkpoint that are recorded."""
PERMITTED = ("precision", "fp8", "cross_documents", "loss_mask")
"""Facts of a setting that `run.allow` may change, and that change the first step by more than
rounding."""
WHY_SECOND = (
    "the weights are whole; moments, the count of updates, the rate or master weights are not"
)
WHY_FIRST = "the weights, the data or what computes them is another"


class Recorded(NamedTuple):
    """Steps after a checkpoint as the ledger has them."""

    checkpoint: str
    manifest_sha256: str
    setting: dict[str, str]
    config: str
    """Digest of the config that did them; see `setting.config_digest`."""
    steps: tuple[FollowedStep, ...]


def recorded_steps(entries: Sequence[Entry], name: str, sha256: str) -> Recorded | None:
    """Return the last record of the steps after checkpoint `name`, None without one.

    A checkpoint that the ledger does not know has taken the place of the one that it saved under
    this name: it must do the steps of that one.
    """
    saved: list[str] = []
    for event in (entry.event for entry in entries):
        if isinstance(event, CheckpointSaved) and event.checkpoint == name:
            saved += [] if event.recovered else [event.manifest_sha256]
            step = event.step
        elif isinstance(event, Resumed) and saved and event.step < step:
            # Set aside: another one may have come under its name.
            saved = []
    if saved and sha256 not in saved:
        sha256 = saved[-1]
    found = [
        event for event in of_kind(entries, CheckpointFollowed) if event.manifest_sha256 == sha256
    ]
    if not found:
        return None
    last = found[-1]
    setting = {key: str(value) for key, value in last.setting.items()}
    return Recorded(last.checkpoint, last.manifest_sha256, setting, last.config, last.steps)


def half_recorded(entries: Sequence[Entry], step: int) -> CheckpointFollowed | None:
    """Return the newest record, if it ends after one step, and that is `step`."""
    found = of_kind(entries, CheckpointFollowed)[-1:]
    return found[0] if found and [part.step for part in found[0].steps] == [step] else None


def changed_facts(before: dict[str, str], now: dict[str, str]) -> tuple[str, ...]:
    """Say which facts of a setting are others: `tensor 2 -> 1`; of a list, which of its parts."""
    keys = dict.fromkeys((*before, *now))
    return tuple(
        " -> ".join(_apart(key, before.get(key, "unknown"), now.get(key, "unknown")))
        for key in keys
        if before.get(key) != now.get(key)
    )


def _apart(key: str, before: str, now: str) -> tuple[str, str]:
    """Return both sides of a change; of the kernels' line only what the other side has not."""
    if key == "kernels":
        was, found = before.split(", "), now.split(", ")
        gone = [part for part in was if part not in found]
        new = [part for part in found if part not in was]
        if gone or new:
            before, now = (", ".join(parts) or "nothing" for parts in (gone, new))
    return f"{key} {before}", now


def comparable_steps(recorded: Recorded, setting: Mapping[str, str], config: str) -> int:
    """Return how many steps under this setting and config may be compared with a record.

    With other numbers in the config the second step is another one on purpose, and with another
    precision or other documents the first one, too.
    """
    if recorded.config == config:
        return STEPS
    known = recorded.setting
    other = any(known.get(key, setting[key]) != setting[key] for key in PERMITTED if key in setting)
    return 0 if other else 1


def step_difference(
    before: FollowedStep,
    now: FollowedStep,
    after: int,
    rounding: Rounding | None,
    same_config: bool = True,
) -> str:
    """Say how a step differs from its record, "" if it does not.

    It is the step number `after` since the checkpoint. `rounding` bounds the distance; None: every
    bit is compared. The rate is that of the record under the `same_config` only.
    """
    if before.step != now.step:
        return f"was done in the place of step {before.step}"
    if before.ids != now.ids:
        return f"was fed other ids ({now.ids}, recorded {before.ids})"
    if before.lr != now.lr and same_config:
        return f"used the rate {now.lr!r}, recorded {before.lr!r}"
    if before.applied != now.applied:
        told = ["skipped", "applied"]
        return f"was {told[now.applied]}, recorded as {told[before.applied]}"
    for name in ("loss", "grad_norm"):
        was, found = getattr(before, name), getattr(now, name)
        # NaN differs from itself, but two losses that are not finite are equal here.
        if was == found or (was != was and found != found):
            continue
        bound = 0.0 if rounding is None else rounding.bound(name, after)
        apart = abs(found - was)
        if not apart <= bound * abs(was):
            limit = "" if rounding is None else f"; rounding explains {bound * abs(was):.3g}"
            return f"has {name} {found!r}, recorded {was!r}, {apart:.3g} apart{limit}"
    return ""


@dataclass
class Comparison:
    """Compares the first steps after a load with their record, as they are done.

    `rounding` is None where every bit must be equal. `comparable` is the number of steps that may
    be compared: fewer where the config was changed on purpose.
    """

    recorded: Recorded
    rounding: Rounding | None
    comparable: int = STEPS
    same_config: bool = True
    done: int = 0
    difference: str = ""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compare."""
        return bool(self.difference) or self.done >= min(len(self.recorded.steps), self.comparable)

    def compare(self, now: FollowedStep) -> None:
        """Compare the next step; `difference` then says what is wrong, "" for nothing."""
        before = self.recorded.steps[self.done]
        if before.step == now.step and (before.chunk, before.rows) != (now.chunk, now.rows):
            # The order was changed by an event of the ledger.
            self.comparable = self.done
            return
        self.done += 1
        if problem := step_difference(before, now, self.done, self.rounding, self.same_config):
            equal = f"step {now.step - 1} equals its record, " if self.done > 1 else ""
            why = WHY_SECOND if self.done > 1 else WHY_FIRST
            self.difference = f"{self.recorded.checkpoint}: {equal}step {now.step} {problem}: {why}"


@dataclass
class _Followed:
    """A checkpoint whose next steps are being done."""

    checkpoint: str
    step: int
    sha256: str = ""
    steps: list[FollowedStep] = field(default_factory=list)


class FollowedRecord:
    """Collects the steps after each checkpoint; `write` is called with an event once it is known.

    On rank 0. A save runs in the background, so its hash may come before or after its steps.
    """

    def __init__(
        self,
        attempt: int,
        setting: dict[str, str],
        config: str,
        write: Callable[[CheckpointFollowed], None],
    ):
        self.attempt, self.setting, self.config, self.write = attempt, setting, config, write
        self._open: list[_Followed] = []
        self._hashes: dict[str, str] = {}

    def saving(self, checkpoint: str, step: int) -> None:
        """Note that a checkpoint of the state after `step` is being saved."""
        self._open.append(_Followed(checkpoint, step))

    def saved(self, checkpoint: str, manifest_sha256: str) -> None:
        """Note that it is whole; may be called from the saving thread."""
        self._hashes[checkpoint] = manifest_sha256

    def loaded(self, checkpoint: str, step: int, manifest_sha256: str) -> None:
        """Note that training goes on from a checkpoint whose steps are not on record."""
        self._open = [_Followed(checkpoint, step, manifest_sha256)]

    def go_on(self, event: CheckpointFollowed | None) -> None:
        """Complete the record of a checkpoint whose first step an earlier start has done."""
        if event is not None and event.setting == self.setting and event.config == self.config:
            before = event.steps[0].step - 1
            part = _Followed(event.checkpoint, before, event.manifest_sha256, list(event.steps))
            self._open.append(part)

    def went_back(self) -> None:
        """Forget what is open: the state is another one now."""
        self._open = []

    def step_done(self, step: FollowedStep, trusted: bool) -> None:
        """Add a step to the checkpoints before it; not `trusted`: its values were changed."""
        for part in list(self._open):
            following = part.step + len(part.steps) + 1
            if len(part.steps) < STEPS and (step.step != following or not trusted):
                self._open.remove(part)
            elif len(part.steps) < STEPS:
                part.steps.append(step)
        self._write_known(STEPS)

    def end(self) -> None:
        """Write what is known when the run ends: one step, where no other follows."""
        self._write_known(1)

    def _write_known(self, least: int) -> None:
        for part in list(self._open):
            sha256 = part.sha256 or self._hashes.get(part.checkpoint, "")
            if len(part.steps) < least or not sha256:
                continue
            self._open.remove(part)
            self.write(
                CheckpointFollowed(
                    attempt=self.attempt,
                    checkpoint=part.checkpoint,
                    manifest_sha256=sha256,
                    setting=self.setting,
                    config=self.config,
                    steps=tuple(part.steps),
                )
            )


def drill_is_due(entries: Sequence[Entry], setting: dict[str, str]) -> bool:
    """Whether no restart on this setting was ever seen to give the recorded bits.

    Where kernels do not repeat to the bit, that they were within rounding is enough.
    """
    loose = setting.get("deterministic") == "False"
    return not any(
        event.same and (event.bits or loose) and dict(event.setting) == setting
        for event in of_kind(entries, ResumeDrilled)
    )
