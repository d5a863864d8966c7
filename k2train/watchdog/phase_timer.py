"""For how long a rank has been at one place, and how far that is over the limit; by a monotonic clock only.

A place is one step, one evaluation, one save: going from reading to computing within a step does not start its clock again,
or a step of many phases could hang many times as long. Where the work has no usual length (hashing, loading) whoever does it
says that it gets on. Time in which the whole process did not run is given back, and no step is measured by it. Places
are replaced whole, so the thread that asks never sees half of one and the training loop takes no lock.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from k2train.watchdog.timeouts import Timeouts

TICK_SECONDS = 0.25
PAUSE_SECONDS = 3.0
"""A tick this late means that the process was not running, or its threads could not."""


class Phase(NamedTuple):
    """`phase` of `step`; `clock` is shared by phases; `began`, `changed`: when the clock, and the phase, began.

    `paused`: what had been excused when the clock began; `progress`: how often `progress` had been called.
    """

    name: str
    step: int
    clock: str
    began: float
    changed: float
    paused: float
    progress: int


class PhaseTimer:
    """`enter`, `progress`, `step_done` and `saving` from the training loop; `tick` and the rest from the watch."""

    def __init__(self, limits: Timeouts, clock: Callable[[], float]):
        self._limits, self._clock = limits, clock
        self._steps: deque[float] = deque(maxlen=512)
        self._paused_seconds = 0.0
        self._last_tick: float | None = None
        self._save_began: float | None = None
        self._progress = 0
        now = clock()
        self._progressed = (now, 0.0)
        """When, and what had been excused by then."""
        self.current = Phase("start", 0, "start", now, now, 0.0, 0)

    def enter(self, phase: str, step: int) -> None:
        """Go on to a phase."""
        now, clock, before = self._clock(), self._limits.clock_of(phase), self.current
        if (clock, step) == (before.clock, before.step):
            self.current = before._replace(name=phase, changed=now)
        else:
            self.current = Phase(phase, step, clock, now, now, self._paused_seconds, self._progress)

    def progress(self) -> None:
        """The work of this phase gets on: its clock begins again."""
        self._progressed = (self._clock(), self._paused_seconds)
        self._progress += 1

    @property
    def progress_count(self) -> int:
        """How often, at the present place."""
        return self._progress - self.current.progress

    def step_done(self, seconds: float) -> None:
        """The step of the present place took so long, pauses included, which do not count."""
        if (
            self._last_tick is not None
            and self._clock() - self._last_tick > TICK_SECONDS + PAUSE_SECONDS
        ):
            # It ended before the watch came to see the pause it was in: how long it took nobody knows.
            return
        self._steps.append(max(0.0, seconds - (self._paused_seconds - self.current.paused)))

    def saving(self, active: bool) -> None:
        """A save in the background begins or ends."""
        self._save_began = self._clock() if active else None

    def elapsed(self) -> float:
        """Seconds at the present place, or since it last got on."""
        current = self.current
        began, paused = max((current.began, current.paused), self._progressed)
        return self._clock() - began - (self._paused_seconds - paused)

    def limit(self) -> float:
        """The most they may become."""
        return self._limits.seconds(self.current.clock, tuple(self._steps))

    def overrun(self) -> float:
        """Seconds beyond the limit, of the place or of the save in the background; negative: still within."""
        overrun = self.elapsed() - self.limit()
        saving = self._save_began
        return (
            overrun
            if saving is None
            else max(overrun, self._clock() - saving - self._limits.save_seconds)
        )

    def tick(self) -> bool:
        """To be called every TICK_SECONDS; True when the process did not run for some time before, which is excused."""
        now, before = self._clock(), self._last_tick
        self._last_tick = now
        if before is None or now - before <= TICK_SECONDS + PAUSE_SECONDS:
            return False
        self.exclude_pause(now - before)
        return True

    def exclude_pause(self, seconds: float) -> None:
        """The process did not run for so long, up to now."""
        now = self._clock()
        # A place that began in the meantime, or after it, has lost no more than its own time.
        began, _ = max((self.current.began, self.current.paused), self._progressed)
        self._paused_seconds += min(seconds, now - began)
        if self._save_began is not None:
            self._save_began = min(now, self._save_began + seconds)
