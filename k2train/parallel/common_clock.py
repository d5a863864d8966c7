"""One clock for all ranks: marks of a host or a device, as seconds that ranks can compare.

- On one machine the monotonic clock is the kernel's, and so the same in every process.
- Ranks of several machines leave a collective together, and each notes its own clock there. The
  median of some rounds is the offset, and half of their spread its error.
- On CUDA a mark is an event in the computing stream. The first one is tied to the host's clock
  while the device is idle; later ones are elapsed time from it.

Alternatives considered:
- The wall clock: it is set and slewed while a run trains.
- Half of a round trip, as NTP: one exchange for each rank, and a collective is as exact as the
  spans need, which are milliseconds.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter

from k2train.parallel.agreement import Agreement
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.messages import TEXTS
from k2train.parallel.own_time import DeviceMarks

ROUNDS = 9
"""Rounds in which ranks of several machines compare their clocks."""
_SECONDS = TypeAdapter(float)


class Clock(Protocol):
    """Marks of one rank, and their seconds on the host's monotonic clock."""

    def anchor(self) -> None:
        """Tie the marks to the host's clock, before the first one."""

    def mark(self) -> Any:
        """Set a mark behind all work that is queued."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Seconds of marks in their order, read after their work is done."""


class HostClock:
    """Marks of the host, where work is done when its call returns."""

    def anchor(self) -> None:
        """Nothing to tie: a mark is a reading of the clock."""

    def mark(self) -> float:
        """Return now, in seconds."""
        return time.monotonic()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """The marks themselves."""
        return list(marks)


class DeviceClock:
    """Marks of a CUDA device. Each list of marks is measured from the first of the one before."""

    TRIES = 5

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, DeviceMarks()
        self._base: Any = None
        self._at = 0.0

    def anchor(self) -> None:
        """Wait for the device, and take the event that was read back soonest."""
        torch.cuda.synchronize(self._device)
        best = float("inf")
        for _ in range(self.TRIES):
            before = time.monotonic()
            event = self._marks.mark()
            event.synchronize()
            after = time.monotonic()
            if after - before < best:
                best, self._base, self._at = after - before, event, (before + after) / 2

    def mark(self) -> torch.cuda.Event:
        """Queue an event behind the kernels of the current stream."""
        return self._marks.mark()

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Seconds of events; waits for the device."""
        torch.cuda.synchronize(self._device)
        # From mark to mark of a step: an event's time is a float of milliseconds, fine over
        # seconds and coarse over hours.
        at = self._at + self._marks.seconds(self._base, marks[0])
        self._base, self._at = marks[0], at
        return [at + self._marks.seconds(marks[0], mark) for mark in marks]


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class CommonTime:
    """Where a rank's monotonic clock stands to that of all ranks."""

    zero: float
    """Reading of this rank's clock at the moment that all ranks count from."""
    how: str
    error_seconds: float = 0.0


def agree_on_time(grid: ProcessGrid, machine: str) -> CommonTime:
    """Agree on a moment to count from; collective.

    `machine` is equal on ranks whose monotonic clock is one kernel's; "" where that is not known.
    """
    agreement = Agreement(grid)
    machines = [name for (name,) in agreement.all([machine], TEXTS, "compare clocks")]
    is_one = len(set(machines)) == 1 and machines[0] != ""
    rounds = []
    for _ in range(1 if is_one else ROUNDS):
        agreement.sum(torch.zeros(1, dtype=torch.int64), "compare clocks")
        rounds.append(agreement.all(time.monotonic(), _SECONDS, "compare clocks"))

    zero = rounds[0][0]
    if is_one:
        return CommonTime(zero, "the monotonic clock of one machine")
    offset, error = offset_of(rounds, grid.rank)
    return CommonTime(zero + offset, f"clocks of machines, compared {ROUNDS} times", error)


def offset_of(rounds: Sequence[Sequence[float]], rank: int) -> tuple[float, float]:
    """(seconds that a rank's clock is ahead of rank 0's, error), from all clocks at one moment."""
    found = [clocks[rank] - clocks[0] for clocks in rounds]
    return median(found), (max(found) - min(found)) / 2
