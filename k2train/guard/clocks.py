"""For how long a rank has been at one place, and how far that is over the limit; by a monotonic clock only.

A place is one step, one evaluation, one save: going from reading to computing within a step does not start its clock again,
or a step of many phases could hang many times as long. Time in which the whole process did not run is given back. Places
are replaced whole, so the thread that asks never sees half of one and the training loop takes no lock.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from k2train.guard.limits import Limits


class Place(NamedTuple):
    """`phase` of `step`; `clock` is shared by phases; `began`, `changed`: when the clock, and the phase, began."""

    phase: str
    step: int
    clock: str
    began: float
    changed: float

    @property
    def stretch(self) -> tuple[str, int, float]:
        """What excused time belongs to."""
        return self.clock, self.step, self.began


class Clocks:
    """`enter`, `step_done` and `saving` from the training loop; the rest from the watch."""

    def __init__(self, limits: Limits, clock: Callable[[], float]):
        self._limits, self._clock = limits, clock
        self._steps: deque[float] = deque(maxlen=512)
        self.place = Place("start", 0, "start", clock(), clock())
        self._excused = (self.place.stretch, 0.0)
        self._saving: float | None = None

    def enter(self, phase: str, step: int) -> None:
        """Go on to a phase."""
        now, clock, before = self._clock(), self._limits.clock_of(phase), self.place
        same = (clock, step) == (before.clock, before.step)
        self.place = Place(phase, step, clock, before.began if same else now, now)

    def step_done(self, seconds: float) -> None:
        """A step took so long."""
        self._steps.append(seconds)

    def saving(self, active: bool) -> None:
        """A save in the background begins or ends."""
        self._saving = self._clock() if active else None

    def elapsed(self) -> float:
        """Seconds at the present place."""
        place = self.place
        stretch, excused = self._excused
        return self._clock() - place.began - (excused if stretch == place.stretch else 0.0)

    def limit(self) -> float:
        """The most they may become."""
        return self._limits.seconds(self.place.clock, tuple(self._steps))

    def over(self) -> float:
        """Seconds beyond the limit, of the place or of the save in the background; negative: still within."""
        over = self.elapsed() - self.limit()
        saving = self._saving
        return over if saving is None else max(over, self._clock() - saving - self._limits.save_seconds)

    def excuse(self, seconds: float) -> None:
        """The process did not run for so long."""
        stretch, excused = self._excused
        place = self.place
        self._excused = (place.stretch, seconds + (excused if stretch == place.stretch else 0.0))
        if self._saving is not None:
            self._saving += seconds
