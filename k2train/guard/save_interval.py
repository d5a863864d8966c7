"""Checkpoint interval: how often a run saves inside a chunk, from its failures and saves.

- Interval of least loss: sqrt(2 x stall of a save x mean time between failures), of Young 1974
  (doi.org/10.1145/361147.361115) and Daly 2006 (doi.org/10.1016/j.future.2004.11.016). A save in
  the background costs what training waits for it. Work is lost up to the last whole checkpoint; the
  time a save takes adds to every loss, and does not move the best interval.
- At least twice what a save takes until it is whole: it is then read back, and saves do not queue.
- Chunk ends are saved in any case. Saves inside a chunk must gain a hundredth of the time, so short
  chunks and small runs have none.
- Failures are rare, so they are estimated: the published rate of large clusters counts as one more
  observation, and never hides what was measured.
- When starts ended before their first save, this one saves within half the time they had.
- Plain numbers and no clock of its own: two starts with the same record choose alike.

Alternatives considered:
- A fixed number: right for one cluster in one month. `checkpoint.every_seconds` can still fix it.
- Daly's higher-order terms: they matter when a save costs as much as a tenth of the time between
  failures, and change the loss by a few hundredths even then.
"""

import math
from dataclasses import dataclass
from statistics import median
from typing import Literal

from k2train.guard.failure_history import WINDOW_SAVES, FailureHistory, SaveCost
from k2train.text import counted, duration

PRIOR_DEVICE_SECONDS = 8000 * 3600.0
"""Training of one device per failure before any was measured.

Published: 7.9 h on 1,024 GPUs, so 8,100 GPU hours (arxiv.org/abs/2410.21680), and 419 failures in
54 days on 16,384 GPUs, so 50,700 GPU hours (arxiv.org/abs/2407.21783). The lower end is taken:
to save too seldom costs more than to save too often.
"""
SAVES_APART = 2.0
"""Shortest interval, in times of a save."""
MEASURED_STEPS = 3
"""Steps from which on their mean counts: the first ones compile and warm up."""
LEAST_GAIN = 0.01
"""Share of the training time that saves inside chunks must gain."""


@dataclass(frozen=True)
class SaveInterval:
    """A chosen interval, and what it follows from. Times in seconds."""

    seconds: float | None
    """Time between saves inside a chunk; None: at chunk ends only."""
    first_seconds: float | None
    """Time to the first save of this start, where starts ended before theirs; None: as usual."""
    failures: int
    trained_seconds: float
    """Training of this world in which the failures happened."""
    mtbf_seconds: float
    """Estimated mean time between failures."""
    stall_seconds: float
    save_seconds: float

    @property
    def saves_inside(self) -> bool:
        """Whether there are saves inside chunks."""
        return self.seconds is not None or self.first_seconds is not None

    def is_close_to(self, other: "SaveInterval | None") -> bool:
        """Whether both mean much the same, so that the change needs no line."""
        if other is None or (self.seconds is None) != (other.seconds is None):
            return False
        return self.seconds is None or abs(math.log(self.seconds / (other.seconds or 1.0))) < 0.5

    def text(self) -> str:
        """Say how often the run saves, and why."""
        often = "at chunk ends only" if self.seconds is None else "inside chunks"
        every = "" if self.seconds is None else f"every {duration(self.seconds)} "
        soon = self.first_seconds
        first = (
            ""
            if soon is None
            else f", first after {duration(soon)}, since starts ended before they had saved"
        )
        measured = (
            f"{counted(self.failures, 'failure')} in {duration(self.trained_seconds)} of training"
            if self.failures
            else f"no failure yet, one in {duration(self.mtbf_seconds)} expected on so many devices"
        )
        return (
            f"saves {every}{often}{first}: {measured}; a save stalls {self.stall_seconds:.1f} s, "
            f"takes {self.save_seconds:.1f} s (checkpoint.every_seconds: auto)"
        )


def mean_time_between_failures(failures: int, trained_seconds: float, devices: int) -> float:
    """Estimate the seconds between failures of a world of `devices`.

    The published rate counts as one failure in its time. It can only lower what was measured:
    (trained + prior) / (failures + 1), at most trained / failures.
    """
    estimate = (trained_seconds + PRIOR_DEVICE_SECONDS / devices) / (failures + 1)
    return min(estimate, trained_seconds / failures) if failures else estimate


def best_interval(mtbf_seconds: float, cost: SaveCost) -> float:
    """Return the interval of least loss in seconds (Young, Daly), `SAVES_APART` at least."""
    return max(math.sqrt(2 * cost.stall * mtbf_seconds), SAVES_APART * cost.seconds)


def lost_share(interval_seconds: float, mtbf_seconds: float, stall_seconds: float) -> float:
    """Return the share of the time that saves cost, and failures take back, to first order."""
    return stall_seconds / interval_seconds + interval_seconds / (2 * mtbf_seconds)


def choose_interval(
    history: FailureHistory, devices: int, cost: SaveCost, chunk_seconds: float | None
) -> SaveInterval:
    """Choose the interval of a world of `devices`.

    `chunk_seconds` is the time between numbered checkpoints, None while no step was measured.
    """
    trained = history.device_seconds / devices
    mtbf = mean_time_between_failures(history.failures, trained, devices)
    best = best_interval(mtbf, cost)

    gain = 0.0
    if chunk_seconds is not None and best < chunk_seconds:
        # A numbered checkpoint is saved in any case.
        by_chunk = lost_share(chunk_seconds, mtbf, cost.stall)
        gain = by_chunk - lost_share(best, mtbf, cost.stall)

    interrupted = history.interrupted_seconds
    first = None if interrupted is None else max(0.0, interrupted / 2 - cost.seconds)
    return SaveInterval(
        best if gain >= LEAST_GAIN else None,
        first,
        history.failures,
        trained,
        mtbf,
        cost.stall,
        cost.seconds,
    )


class SaveTimer:
    """When to save inside a chunk. Times are those of one monotonic clock, in seconds.

    `every` fixes the interval (0: never); `auto` chooses it, for `chunk_steps` steps between
    numbered checkpoints on `devices`.
    """

    def __init__(
        self,
        every: float | Literal["auto"],
        chunk_steps: int = 0,
        devices: int = 1,
        history: FailureHistory | None = None,
    ) -> None:
        self.every, self.chunk_steps, self.devices = every, chunk_steps, devices
        self.history = history or FailureHistory()
        self._saves = list(self.history.saves)
        self._steps, self._trained = 0, 0.0
        self._last_step = self.history.step_seconds or 0.0
        self._saved_at = 0.0
        self._has_saved = False

    def restart(self, now: float) -> None:
        """Count the time to the next save from `now`."""
        self._saved_at = now

    def step_done(self, seconds: float) -> None:
        """Note a step of this start."""
        self._steps += 1
        self._trained += seconds
        self._last_step = seconds

    def saving(self, now: float) -> None:
        """Note that training goes on after the copy of a save."""
        self._has_saved = self._has_saved or self._steps > 0
        self.restart(now)

    def saved(self, cost: SaveCost) -> None:
        """Note what a save took; from any thread."""
        self._saves = [*self._saves, cost][-WINDOW_SAVES:]

    @property
    def interval(self) -> SaveInterval | None:
        """The interval as measured by now; None if the config fixes it."""
        if self.every != "auto":
            return None

        saves, step = self._saves or [SaveCost(0.0, 0.0)], self.history.step_seconds
        cost = SaveCost(median(s.stall for s in saves), median(s.seconds for s in saves))
        if self._steps >= MEASURED_STEPS:
            step = self._trained / self._steps
        # Without a measured save there is nothing to weigh.
        chunk = None if step is None or not self._saves else step * self.chunk_steps
        # This start has trained without a failure so far.
        known = FailureHistory(
            self.history.failures,
            self.history.device_seconds + self._trained * self.devices,
            interrupted_seconds=None if self._has_saved else self.history.interrupted_seconds,
        )
        return choose_interval(known, self.devices, cost, chunk)

    def is_due(self, now: float, saving: bool) -> bool:
        """Whether the step that begins shall end with a save; `saving`: one is still running."""
        if (interval := self.interval) is None:
            return self.every != "auto" and 0 < self.every <= now - self._saved_at
        if saving or not interval.saves_inside:
            return False
        limits = [s for s in (interval.seconds, interval.first_seconds) if s is not None]
        # The save begins at the end of the step.
        return now - self._saved_at + self._last_step >= min(limits)
