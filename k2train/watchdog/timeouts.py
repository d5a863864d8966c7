"""How long a run may stay at one place before it counts as stuck.

A limit for each kind of place, since they differ by orders of magnitude. The one of a step is learnt from the run: twice
the 99th percentile of the steps so far, so that a slow machine is not called stuck and a fast one does not wait for ten
minutes. Refused: one timeout for all (K2 ran with 600 minutes), which must be as long as the slowest start.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CLOCKS = {
    "start": "start",
    "choose": "choose",
    "load": "load",
    "read": "step",
    "step": "step",
    "reduce": "step",
    "update": "step",
    "evaluate": "evaluate",
    "save": "save",
    "done": "start",
}
"""Phase -> the clock it runs on. Those of a start are limited alike and each by itself: hashing checkpoints (`choose`), reading
one (`load`), the rest. How long these take depends on how much there is to read, so `Watchdog.progress` restarts them."""
FIRST_STEPS = 5
"""Fewer say nothing yet: kernels are chosen and compiled in the first ones."""
ENOUGH_STEPS = 20
FLOOR_SECONDS = 10.0


@dataclass(frozen=True)
class Timeouts:
    """Seconds; `step_seconds` 0: from what steps took. `heartbeat_seconds` 0: no watch.

    `start_seconds` is for each phase of a start. `save_seconds` must hold also how long a save may try again.
    """

    heartbeat_seconds: float = 1.0
    start_seconds: float = 600.0
    step_seconds: float = 0.0
    save_seconds: float = 1800.0
    evaluate_seconds: float = 600.0

    @property
    def silent_after(self) -> float:
        """A heartbeat that stands still for so long belongs to a process that does not run."""
        return max(2.0, 2.5 * self.heartbeat_seconds)

    def clock_of(self, phase: str) -> str:
        """The clock that a phase runs on."""
        assert phase in CLOCKS, f"unknown phase {phase!r}; they are {', '.join(CLOCKS)}"
        return CLOCKS[phase]

    def seconds(self, clock: str, steps: Sequence[float]) -> float:
        """The limit on a clock, after steps that took so long."""
        if clock == "step":
            return self._step(steps)
        return {"evaluate": self.evaluate_seconds, "save": self.save_seconds}.get(
            clock, self.start_seconds
        )

    def _step(self, steps: Sequence[float]) -> float:
        if self.step_seconds > 0:
            return self.step_seconds
        if len(steps) < FIRST_STEPS:
            return max(self.start_seconds, FLOOR_SECONDS)
        if len(steps) < ENOUGH_STEPS:
            return max(3 * FLOOR_SECONDS, 5.0 * max(steps))
        return max(FLOOR_SECONDS, 2.0 * sorted(steps)[(len(steps) * 99 - 1) // 100])
