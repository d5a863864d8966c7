"""Timing of repeated work on a CPU or a GPU: medians, and the distance of the quartiles.

- On CUDA a sample is the time between two events; the queue is empty before and after.
- On a CPU it is elapsed time, or processor time: of one thread, other programs do not change it.
- Work is taken in turns, so that a busy moment hits all of it.

Alternatives considered:
- The fastest of many: no training step is made of the fastest of everything.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Repeated times of one piece of work."""

    seconds: float
    """The median."""
    spread: float
    """Distance of the quartiles, as a share of the median."""


def times_of(samples: Sequence[float]) -> Times:
    """Median and spread of at least two samples in seconds."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Times(middle, (high - low) / middle if middle > 0 else 0.0)


class Clock:
    """Clock of one device."""

    def __init__(self, device: torch.device, kind: str = "elapsed", threads: int = 1):
        self.device, self.kind, self.threads = device, kind, threads

    @property
    def cuda(self) -> bool:
        """Whether events on the device are the clock."""
        return self.device.type == "cuda"

    def now(self) -> float:
        """Seconds on the host's clock; of several threads their average processor time."""
        if self.kind == "processor" and not self.cuda:
            return time.process_time() / self.threads
        return time.perf_counter()

    def seconds_of(self, work: Callable[[], Any]) -> float:
        """Time one call of `work`."""
        if self.cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3
        began = self.now()
        work()
        return self.now() - began
