"""Device timing: warmed up, in turns, medians.

- On CUDA each sample is between two events, after a write that empties the second-level cache and
  keeps the device busy while the host queues the work. So host time shows only where the host is
  slower.

Alternatives considered:
- Host clocks around a synchronisation: they measure the queue.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.bench import Bench, OutOfTimeError

Work = Callable[[], object]
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds of one piece of work: the median, and the quartiles as spread."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles relative to the median."""
        return (self.high - self.low) / self.median


def summary(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of samples in seconds."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(middle, low, high, len(seconds))


class Timer:
    """Timer of work on one device."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self._flush = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=bench.device) if bench.cuda else None
        )

    def once(self, work: Work) -> float:
        """Time `work` once, in seconds."""
        if self._flush is None:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def in_turns(self, works: Sequence[Work], rounds: int = 10, warm_up: int = 2) -> list[Timing]:
        """Time each work `rounds` times in turns, so that a busy or hot moment hits all of them.

        Raises OutOfTimeError when the rounds would not fit before the deadline, by the last
        warm-up.
        """
        spent = 0.0
        for _ in range(warm_up):
            began = time.monotonic()
            for work in works:
                self.once(work)
            spent = time.monotonic() - began

        if spent * rounds > self.bench.left_seconds:
            raise OutOfTimeError(
                f"{rounds} rounds take {spent * rounds:.0f} s, {self.bench.left_seconds:.0f} s "
                "were left"
            )

        seconds: list[list[float]] = [[] for _ in works]
        for _ in range(rounds):
            for into, work in zip(seconds, works, strict=True):
                into.append(self.once(work))

        return [summary(values) for values in seconds]

    def alone(self, work: Work, rounds: int = 10, warm_up: int = 2) -> Timing:
        """Time one work by itself."""
        return self.in_turns([work], rounds, warm_up)[0]


def captured(bench: Bench, work: Work) -> Work:
    """Capture `work` as a graph, for kernels shorter than their launch by the host.

    Returns `work` itself where that fails. The current stream must not be the default one, and what
    `work` differentiates must have run on it.
    """
    if not bench.cuda:
        return work
    try:
        for _ in range(3):
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return work

    return graph.replay
