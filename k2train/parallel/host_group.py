"""Host group: collectives of all ranks for tensors in host memory, with few connections of each.

- gloo connects each rank of a group with every other one, and each reads the addresses of all.
- Up to `plan.connections.FLAT_RANKS` ranks are one group. More are rows of about the square root of
  the world; the first ranks of the rows are a second group.
- A collective then goes up its row, along the first ranks, and down the rows again. A rank has
  about 128 connections at 16,384 ranks, and the first of a row 256.
- Integers give the same bits either way; sums of floats are added in another order.

Alternatives considered:
- One gloo group at any size: at 16,384 ranks half a billion reads from one store, and 16,383
  sockets of each rank.
- gloo's connections at first use: see `parallel.grid`.
- NCCL for these: a communicator of all ranks, and a copy to the device for every flag.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.plan.connections import FLAT_RANKS, host_row_ranks


class HostGroup:
    """All ranks, for host tensors. Every method but the first is collective.

    `row` holds `width` consecutive ranks, the last row perhaps fewer. `firsts` holds the first rank
    of every row, on those alone; None where one row is the world.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        width: int,
        row: dist.ProcessGroup,
        firsts: dist.ProcessGroup | None = None,
    ):
        self.rank, self.world_size, self.width = rank, world_size, width
        self.row, self.firsts = row, firsts
        self.begin = rank - rank % width
        """First rank of this rank's row."""
        self.rows = -(-world_size // width)

    @property
    def is_flat(self) -> bool:
        """Whether one row is the world."""
        return self.rows == 1

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """Reduce `x` over all ranks, in place."""
        if self.is_flat:
            dist.all_reduce(x, op=op, group=self.row)
            return
        dist.reduce(x, self.begin, op=op, group=self.row)
        if self.firsts is not None:
            dist.all_reduce(x, op=op, group=self.firsts)
        self._down(x)

    def broadcast(self, x: Tensor, source: int) -> None:
        """Copy `x` of rank `source` into that of every rank."""
        if self.is_flat:
            dist.broadcast(x, src=source, group=self.row)
            return
        from_row = source - source % self.width
        if self.begin == from_row:
            dist.broadcast(x, src=source, group=self.row)
        if self.firsts is not None:
            dist.broadcast(x, src=from_row, group=self.firsts)
        if self.begin != from_row:
            self._down(x)

    def gather(self, x: Tensor) -> Tensor:
        """Gather [...] of every rank on rank 0 as [world, ...]; others get an empty tensor."""
        if self.is_flat:
            return self._gathered(x, self.row, self.world_size, 0)
        # The last row may be short: its first rank sends rows of zeros that rank 0 cuts off.
        rows = x.new_zeros((self.width if self.firsts is not None else 0, *x.shape))
        size = min(self.width, self.world_size - self.begin)
        found = self._gathered(x, self.row, size, self.begin)
        rows[: len(found)] = found
        if self.firsts is None:
            return rows
        found = self._gathered(rows, self.firsts, self.rows, 0)
        return found.view(-1, *x.shape)[: self.world_size]

    def all_gather(self, x: Tensor) -> Tensor:
        """Gather [...] of every rank on every rank as [world, ...]."""
        if self.is_flat:
            rows = x.new_empty((self.world_size, *x.shape))
            dist.all_gather(list(rows.unbind()), x, group=self.row)
            return rows
        rows = self.gather(x)
        if self.rank != 0:
            rows = x.new_empty((self.world_size, *x.shape))
        rows = rows.contiguous()
        self.broadcast(rows, 0)
        return rows

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.is_flat:
            dist.barrier(group=self.row)
        else:
            self.all_reduce(torch.zeros(1, dtype=torch.int64))

    def _down(self, x: Tensor) -> None:
        """Copy `x` of the first rank of each row into that of the others."""
        dist.broadcast(x, src=self.begin, group=self.row)

    def _gathered(self, x: Tensor, group: dist.ProcessGroup, size: int, first: int) -> Tensor:
        rows = x.new_empty((size if self.rank == first else 0, *x.shape))
        dist.gather(x, list(rows.unbind()) or None, dst=first, group=group)
        return rows


def make_host_groups(
    rank: int,
    world_size: int,
    backend: str,
    timeout: timedelta,
    count: int = 1,
    flat_ranks: int = FLAT_RANKS,
) -> list[HostGroup]:
    """Make `count` groups of all ranks, of a backend that takes host tensors. Collective.

    Every rank must have made as many groups before, and makes no others after.
    """
    if world_size <= flat_ranks:
        wholes = [dist.new_group(backend=backend, timeout=timeout) for _ in range(count)]
        return [HostGroup(rank, world_size, world_size, whole) for whole in wholes]

    def make(ranks: list[int], name: str) -> dist.ProcessGroup:
        return dist.new_group(
            ranks,
            timeout=timeout,
            backend=backend,
            use_local_synchronization=True,
            group_desc=name,
        )

    width = host_row_ranks(world_size, flat_ranks)
    begin = rank - rank % width
    # torch names such a group by its ranks and by how many groups a rank is in. So all rows come
    # first, that of a single rank among them: the first ranks of rows are in more groups then.
    row = list(range(begin, min(begin + width, world_size)))
    rows = [make(row, "row of host tensors") for _ in range(count)]
    if rank != begin:
        return [HostGroup(rank, world_size, width, one) for one in rows]
    ranks = list(range(0, world_size, width))
    firsts = [make(ranks, "first ranks of rows of host tensors") for _ in range(count)]
    return [
        HostGroup(rank, world_size, width, one, first)
        for one, first in zip(rows, firsts, strict=True)
    ]
