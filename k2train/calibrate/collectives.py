"""Collectives between real processes to be timed: those of layers, of a step, and sends.

- They are those of `parallel.collectives`, and the gather of updated weights. A CPU has gloo
  through loopback, and for two ranks shared memory; GPUs have NCCL.
- A sample is several calls after a barrier, for each call: the barrier's own end is not sharp.
- Bytes are those of the whole tensor. A send goes to the neighbour and comes back, and half counts.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from k2train.calibrate.clock import Clock, Times, times_of
from k2train.parallel.collectives import all_gather, all_reduce, reduce_scatter
from k2train.parallel.grid import Axis
from k2train.parallel.param_gather import gather_shards

CALLS = 4
"""Calls of a sample."""


def collective_times(
    clock: Clock, axis: Axis, sizes: list[int], rounds: int
) -> Iterator[tuple[str, int, Times]]:
    """Time every kind of collective at every size in bytes; collective.

    Ranks beyond the first two do not send, and yield nothing for it.
    """
    for size in sizes:
        works = _works(clock.device, axis, size)
        for kind, work in works.items():
            samples = []
            for _ in range(rounds + 1):
                dist.barrier(group=axis.group)
                samples.append(clock.seconds_of(partial(_repeat, work)) / CALLS)
            if kind != "send" or axis.rank < 2:
                yield kind, size, times_of(samples[1:])


def _repeat(work: Callable[[], object]) -> None:
    for _ in range(CALLS):
        work()


def _works(device: torch.device, axis: Axis, size: int) -> dict[str, Callable[[], object]]:
    count = max(axis.size, size // 4 // axis.size * axis.size)
    whole = torch.zeros(count, device=device)
    part = torch.zeros(count // axis.size, device=device)
    shards = whole.view(axis.size, -1)

    def exchange() -> None:
        # A send and a receive in turns; two of them are one call's worth of each.
        if axis.rank > 1:
            return
        other = 1 - axis.rank
        for sender in (0, 1):
            if axis.rank == sender:
                dist.send(whole, other, group=axis.group)
            else:
                dist.recv(whole, other, group=axis.group)

    return {
        "all-reduce": lambda: all_reduce(whole, axis),
        "all-gather": lambda: all_gather(part, axis),
        "reduce-scatter": lambda: reduce_scatter(whole, axis),
        "weight-gather": lambda: gather_shards(shards, axis, wait=True),
        "send": exchange,
    }
