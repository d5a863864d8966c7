"""Phase timer: time spent in the current phase, compared with its timeout (monotonic clock).

- A clock covers one step, one evaluation or one save. Moving from reading to computing within a
  step does not restart it, or a step of many phases could hang many times as long.
- Work without a usual length (hashing, loading) reports its progress, which restarts the clock.
- Time in which the whole process did not run is subtracted, and no step is measured by it.
- A phase is an immutable tuple that is replaced as a whole. The watchdog thread never sees half of
  one, and the training loop takes no lock.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from k2train.watchdog.timeouts import Timeouts

TICK_SECONDS = 0.25
PAUSE_SECONDS = 3.0
"""A tick this late means that the process, or its threads, did not run."""


class Phase(NamedTuple):
    """Phase `name` of `step`, and the clock that it shares with other phases.

    - `began`, `changed`: when the clock, and the phase, began.
    - `paused`: seconds already excluded when the clock began.
    - `progress`: number of progress reports at that time.
    """

    name: str
    step: int
    clock: str
    began: float
    changed: float
    paused: float
    progress: int


class PhaseTimer:
    """Times the phases of the training loop.

    The loop calls `enter`, `progress`, `step_done` and `saving`; the watchdog calls the rest.
    """

    def __init__(self, limits: Timeouts, clock: Callable[[], float]):
        self._limits, self._clock = limits, clock
        self._steps: deque[float] = deque(maxlen=512)
        self._paused_seconds = 0.0
        self._last_tick: float | None = None
        self._save_began: float | None = None
        self._progress = 0
        now = clock()
        self._progressed = (now, 0.0)
        """Time of the last progress report, and the seconds excluded by then."""
        self.current = Phase("start", 0, "start", now, now, 0.0, 0)

    def enter(self, phase: str, step: int) -> None:
        """Enter a phase."""
        now, clock, before = self._clock(), self._limits.clock_of(phase), self.current
        # Another phase of the same clock and step: the clock continues.
        if (clock, step) == (before.clock, before.step):
            self.current = before._replace(name=phase, changed=now)
        else:
            self.current = Phase(phase, step, clock, now, now, self._paused_seconds, self._progress)

    def progress(self) -> None:
        """Report progress in this phase, which restarts its clock."""
        self._progressed = (self._clock(), self._paused_seconds)
        self._progress += 1

    @property
    def progress_count(self) -> int:
        """Number of progress reports in the current phase."""
        return self._progress - self.current.progress

    def step_done(self, seconds: float) -> None:
        """Record the duration of the current step, without the pauses in it."""
        if (
            self._last_tick is not None
            and self._clock() - self._last_tick > TICK_SECONDS + PAUSE_SECONDS
        ):
            # The step ended before the watchdog noticed the pause in it, so its duration is
            # unknown.
            return
        self._steps.append(max(0.0, seconds - (self._paused_seconds - self.current.paused)))

    def saving(self, active: bool) -> None:
        """Begin or end a background save."""
        self._save_began = self._clock() if active else None

    def elapsed(self) -> float:
        """Seconds in the current phase, or since its last progress."""
        current = self.current
        # The later of the clock's beginning and the last progress report counts.
        began, paused = max((current.began, current.paused), self._progressed)
        return self._clock() - began - (self._paused_seconds - paused)

    def limit(self) -> float:
        """Timeout of the current phase in seconds."""
        return self._limits.seconds(self.current.clock, tuple(self._steps))

    def overrun(self) -> float:
        """Seconds beyond the timeout of the phase or of the background save.

        Negative when both are within their timeouts.
        """
        overrun = self.elapsed() - self.limit()
        saving = self._save_began
        return (
            overrun
            if saving is None
            else max(overrun, self._clock() - saving - self._limits.save_seconds)
        )

    def tick(self) -> bool:
        """Call every TICK_SECONDS. True when the process was paused before, which is excluded."""
        now, before = self._clock(), self._last_tick
        self._last_tick = now
        # A late tick: the process, or its threads, did not run in between.
        if before is None or now - before <= TICK_SECONDS + PAUSE_SECONDS:
            return False
        self.exclude_pause(now - before)
        return True

    def exclude_pause(self, seconds: float) -> None:
        """Exclude a pause of the process that ended just now."""
        now = self._clock()
        # A phase that began during or after the pause loses at most its own time.
        began, _ = max((self.current.began, self.current.paused), self._progressed)
        self._paused_seconds += min(seconds, now - began)
        if self._save_began is not None:
            self._save_began = min(now, self._save_began + seconds)
