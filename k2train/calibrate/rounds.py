"""Rounds over all kernels of a calibration, in turns, on all ranks together.

- Kernels take turns, so that a busy moment hits all of them.
- One round is also the reference by which a check follows the machine's speed: the kernels of a
  step, in about the shares that a step has of them.
- A kernel that waited for the other ranks starts colder than one that did not. So engines, which
  wait for nobody, have a reference of their own: a round that each rank makes alone.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from k2train.calibrate.clock import Clock, times_of
from k2train.calibrate.kernels import COPIES, SHAPES, TINY, Case, Cases, memory_case, peak_case


class KernelRounds:
    """Kernels of one rank, timed round by round; collective where there are several ranks."""

    def __init__(self, clock: Clock, task: dict[str, Any]):
        self.clock, self._turn = clock, 0
        self.sums: list[float] = []
        """Seconds of all kernels of the first precision, in each round of all ranks so far."""
        self.alone: list[float] = []
        """The same of rounds in which no rank waited for another, one beside each of `sums`."""
        shapes = TINY if task["tiny"] else SHAPES[task["device"]]
        self.cases: list[tuple[str, Case]] = []
        for precision in task["precisions"]:
            self.cases += [(precision, case) for case in Cases(clock.device, precision, shapes)]
            self.cases.append((precision, peak_case(clock.device, precision, shapes)))
        self.cases.append(("", memory_case(clock.device, shapes)))

    def round(self) -> list[float]:
        """Seconds of each kernel, once."""
        found = self._times(self.cases, together=True)
        self.sums.append(self.sum_of_first(found))
        return found

    def reference(self) -> float:
        """Seconds of all kernels of the first precision, in one round of these alone."""
        self.sums.append(sum(self._times(self._first(), together=True)))
        return self.sums[-1]

    def reference_alone(self) -> float:
        """As `reference`, and no rank waits for another before a kernel."""
        return sum(self._times(self._first(), together=False))

    def _first(self) -> list[tuple[str, Case]]:
        return [one for one in self.cases if one[0] == self.cases[0][0]]

    def _times(self, cases: Sequence[tuple[str, Case]], together: bool) -> list[float]:
        found = []
        waits = together and dist.is_initialized() and dist.get_world_size() > 1
        for _, case in cases:
            work = case.prepare(self._turn % COPIES)
            # A layer's kernels ran a moment ago, for the layer before: their code is in the cache.
            case.prepare((self._turn + 1) % COPIES)()
            if waits:
                dist.barrier()
            found.append(self.clock.seconds_of(work))
        self._turn += 1
        return found

    def sum_of_first(self, seconds: Sequence[float]) -> float:
        """Sum of one time for each kernel, over those of the first precision."""
        first = self.cases[0][0]
        both = zip(self.cases, seconds, strict=True)
        return sum(time for (precision, _), time in both if precision == first)


def kernel_times(rounds: KernelRounds, count: int) -> list[list[Any]]:
    """[precision, name, amount, seconds, spread] of every kernel and shape, over `count` rounds."""
    # The first round allocates, and libraries choose their code in it.
    rounds.round()
    samples = []
    for _ in range(count):
        samples.append(rounds.round())
        rounds.alone.append(rounds.reference_alone())
    found = []
    for (precision, case), each in zip(rounds.cases, zip(*samples, strict=True), strict=True):
        times = times_of(each)
        found.append([precision, case.name, list(case.amount), times.seconds, times.spread])
    return found
