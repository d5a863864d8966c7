"""Timeouts: seconds a run may stay in one phase before it counts as stuck.

- Each kind of phase has its own timeout, because they differ by orders of magnitude.
- The step timeout is learned from the run: twice the 99th percentile of its steps. A slow machine
  is not called stuck, and a fast one does not wait for ten minutes.

Alternatives considered:
- One timeout for all phases (K2 ran with 600 minutes): it must cover the slowest start.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CLOCKS = {
    "start": "start",
    "choose": "choose",
    "connect": "connect",
    "load": "load",
    "read": "step",
    "step": "step",
    "reduce": "step",
    "update": "step",
    "evaluate": "evaluate",
    "save": "save",
    "done": "start",
}
"""Phase -> the clock that it runs on.

The phases of a start have the same timeout but separate clocks: hashing checkpoints (`choose`),
the first exchange of each group (`connect`), reading a checkpoint (`load`), the rest. Their length
depends on the amount to read, so `Watchdog.progress` restarts them.
"""
LIMITED_BY = {"step": "step_seconds", "evaluate": "evaluate_seconds", "save": "save_seconds"}
"""Clock -> config key of its timeout; any other clock is a start's."""
FIRST_STEPS = 5
"""Fewer steps are no basis: the first ones choose and compile kernels."""
ENOUGH_STEPS = 20
FLOOR_SECONDS = 10.0


def limit_key(phase: str) -> str:
    """Return the config key that limits a phase: `watch.step_seconds`."""
    return f"watch.{LIMITED_BY.get(CLOCKS.get(phase, ''), 'start_seconds')}"


@dataclass(frozen=True)
class Timeouts:
    """Timeouts in seconds.

    - `heartbeat_seconds` 0: no watchdog.
    - `start_seconds` applies to each phase of a start.
    - `step_seconds` 0: learned from the run's steps.
    - `save_seconds` must include the time for which a save is retried.
    """

    heartbeat_seconds: float = 1.0
    start_seconds: float = 600.0
    step_seconds: float = 0.0
    save_seconds: float = 1800.0
    evaluate_seconds: float = 600.0

    @property
    def silent_after(self) -> float:
        """Seconds without a heartbeat after which a process counts as dead or stopped."""
        return max(2.0, 2.5 * self.heartbeat_seconds)

    def clock_of(self, phase: str) -> str:
        """Clock that a phase runs on."""
        assert phase in CLOCKS, f"unknown phase {phase!r}; they are {', '.join(CLOCKS)}"
        return CLOCKS[phase]

    def seconds(self, clock: str, steps: Sequence[float]) -> float:
        """Timeout of a clock, given the durations of past steps."""
        if clock == "step":
            return self._step(steps)
        return {"evaluate": self.evaluate_seconds, "save": self.save_seconds}.get(
            clock, self.start_seconds
        )

    def _step(self, steps: Sequence[float]) -> float:
        if self.step_seconds > 0:
            return self.step_seconds
        # The first steps compile and warm up, so the timeout of a start applies.
        if len(steps) < FIRST_STEPS:
            return max(self.start_seconds, FLOOR_SECONDS)
        if len(steps) < ENOUGH_STEPS:
            return max(3 * FLOOR_SECONDS, 5.0 * max(steps))
        # Index of the 99th percentile, rounded up.
        return max(FLOOR_SECONDS, 2.0 * sorted(steps)[(len(steps) * 99 - 1) // 100])
