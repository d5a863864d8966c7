"""Host timing of the benches: seconds of a call, and medians of calls in turns."""

import statistics
import time
from collections.abc import Callable

Work = Callable[[], object]


Clock = Callable[[], float]


def seconds_of(work: Work, clock: Clock = time.perf_counter) -> float:
    """Time one call of `work`."""
    began = clock()
    work()
    return clock() - began


def in_turns(
    rounds: int, *works: Work, warmup: int = 1, clock: Clock = time.perf_counter
) -> list[float]:
    """Median seconds of each work, measured in turns so that other load hits all of them.

    Every turn begins with another work: the first one finds another state of the caches. With
    `time.process_time` for a clock other load does not count.
    """
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(warmup + rounds):
        for number in range(len(works)):
            index = (number + turn) % len(works)
            seconds[index].append(seconds_of(works[index], clock))
    return [statistics.median(values[warmup:]) for values in seconds]
