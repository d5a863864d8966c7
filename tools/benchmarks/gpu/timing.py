"""Device times: warmed up, taken in turns, medians.

On CUDA each sample lies between two events, behind a write that empties the second-level cache and keeps the device busy
while the host queues the work; so host time shows only where the host is truly the slower one. Host clocks around a
synchronisation were refused: they measure the queue.
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
    """Seconds of one piece of work: median, and the quartiles as its spread."""

    median: float
    low: float
    high: float
    samples: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median


def summary(seconds: Sequence[float]) -> Timing:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(middle, low, high, len(seconds))


class Timer:
    """Times work on one device."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self._flush = (
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device=bench.device) if bench.cuda else None
        )

    def once(self, work: Work) -> float:
        """Seconds of `work`, once."""
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
        """Each work `rounds` times, in turns, so that a busy or a hot moment hits all of them.

        Raises OutOfTimeError when the rounds would not fit before the deadline, judged by the last warm-up.
        """
        spent = 0.0
        for _ in range(warm_up):
            began = time.monotonic()
            for work in works:
                self.once(work)
            spent = time.monotonic() - began
        if spent * rounds > self.bench.left_seconds:
            raise OutOfTimeError(
                f"{rounds} rounds take {spent * rounds:.0f} s, {self.bench.left_seconds:.0f} s were left"
            )
        seconds: list[list[float]] = [[] for _ in works]
        for _ in range(rounds):
            for into, work in zip(seconds, works, strict=True):
                into.append(self.once(work))
        return [summary(values) for values in seconds]

    def alone(self, work: Work, rounds: int = 10, warm_up: int = 2) -> Timing:
        """One work by itself."""
        return self.in_turns([work], rounds, warm_up)[0]


def captured(bench: Bench, work: Work) -> Work:
    """`work` as a graph that replays without the host, for kernels shorter than their launch; itself where that fails.

    The current stream must not be the default one, and what `work` differentiates must have run on it.
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
