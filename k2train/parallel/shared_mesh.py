"""Shared memory between three or four ranks of one machine: each two are a pair, in turns.

- An all-gather or a reduce-scatter is one block to and from each other rank. gloo carries them
  through TCP, and its threads take the cores from the ranks (`docs/where_time_goes.md`).
- In turn t the ranks a and b with a + b = t, modulo their number, exchange. So each rank has at
  most one partner a turn, and all go through the turns in one order: none waits in a circle.
- Sums stay with the callers, who add blocks in the order of ranks, as they do after gloo.
- All-reduces keep gloo: their sums are gloo's, in its order.

Alternatives considered:
- One memory for all ranks, and a counter that all wait for: the same copies, but a rank that is
  gone has no socket that ends.
- More than four ranks: the memory grows with the square of their number. Not measured.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.parallel.shared_memory import TwoOfGroup, connect_through, in_host_memory
from k2train.parallel.shared_pair import SharedPair
from k2train.plan.transfer_memory import MESH_SIZES, PAIR_BYTES


class SharedMesh:
    """Pairs of this rank with every other one. One thread of each rank uses it."""

    def __init__(self, pairs: Mapping[int, SharedPair], rank: int):
        """`pairs`: other rank -> memory shared with it."""
        size = len(pairs) + 1
        partners = [(turn - rank) % size for turn in range(size)]
        self._turns = [(other, pairs[other]) for other in partners if other != rank]

    def swap(
        self, mine: Sequence[Tensor] | Tensor, theirs: Sequence[Tensor] | Tensor, name: str
    ) -> None:
        """Send mine[r] to each rank r, and receive theirs[r] from it; all contiguous. Collective.

        This rank's own entry of `theirs` is left as it is. Raises RuntimeError as
        `SharedPair.exchange`.
        """
        for other, pair in self._turns:
            pair.exchange(mine[other], partial(_put, theirs[other].view(-1)), name)


def _put(out: Tensor, part: slice, received: Tensor) -> None:
    out[part].copy_(received)


def connect_mesh(
    size: int, rank: int, group: dist.ProcessGroup | None, device: torch.device
) -> SharedMesh | None:
    """Connect every two ranks of a group of three or four. Collective.

    `rank` is the rank in the group. None, on all ranks alike, where not every two of them share
    memory, or their number is another.
    """
    if size not in MESH_SIZES or group is None or not in_host_memory(group, device):
        return None

    pairs: dict[int, SharedPair] = {}
    # All go through the pairs in one order, so that none waits in a circle.
    for first, second in combinations(range(size), 2):
        if rank in (first, second):
            other = first + second - rank
            two = TwoOfGroup(group, other, rank == first)
            pair = connect_through(two, int(rank == second), SharedPair, PAIR_BYTES)
            if pair is not None:
                pairs[other] = pair

    complete = torch.tensor([int(len(pairs) == size - 1)])
    dist.all_reduce(complete, dist.ReduceOp.MIN, group=group)
    return SharedMesh(pairs, rank) if complete.item() else None
