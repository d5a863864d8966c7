"""Gradient buffer whose sums are the same bits for every micro-batch size and data-parallel degree.

- A leaf is the gradient of `units_per_leaf` units of sequences, added one after another. Leaves are
  numbered over all data-parallel ranks, and added in a fixed tree (`k2train.parallel.exact_sum`).
- Each parameter has a working sum, into which layers add as always. When a leaf is complete it goes
  into the parameter's tree, and the next one begins with zeros.
- With more than one data-parallel rank, a bucket's nodes go to the owners of their rows, which add
  the rest of the tree. With a number of leaves that is a power of two a rank has one node, and
  sends as much as a plain reduce-scatter does.
- Memory: one more fp32 sum of a parameter for each level of the tree below the rank's nodes. With
  one leaf a rank there is none.

Alternatives considered:
- A reduce-scatter: its order, and so its bits, depend on the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k2train.parallel.collectives import Pending
from k2train.parallel.comm_tracker import collective_scope
from k2train.parallel.exact_sum import TreeSum, add_ranks
from k2train.parallel.grad_accumulation import GradAccumulator
from k2train.parallel.grad_buffer import GradientBuffer
from k2train.parallel.grid import Axis
from k2train.parallel.shard_layout import BufferSlot
from k2train.plan.sum_tree import Node, nodes_of


@dataclass(frozen=True)
class Leaves:
    """The leaves of a step: how many on each data-parallel rank, of how many units."""

    per_rank: int
    units: int

    def of(self, rank: int) -> range:
        """Leaves of a data-parallel rank."""
        return range(rank * self.per_rank, (rank + 1) * self.per_rank)


class ExactGradientBuffer(GradientBuffer):
    """Gradient buffer that adds leaves in a fixed tree.

    Every parameter must complete once per unit, in the order of the units.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        dp: Axis,
        tp: Axis,
        device: torch.device,
        leaves: Leaves,
        bucket_bytes: int | None = None,
    ):
        self.leaves = leaves
        self._nodes = [nodes_of(leaves.of(rank)) for rank in range(dp.size)]
        self._accumulators: dict[int, GradAccumulator] = {}
        self._trees: dict[int, TreeSum] = {}
        self._free: dict[int, list[Tensor]] = {}
        super().__init__(modules, dp, tp, device, leaves.per_rank * leaves.units, bucket_bytes)

    def _make_accumulator(self, index: int) -> GradAccumulator:
        accumulator = super()._make_accumulator(index)
        self._accumulators[index], self._trees[index] = accumulator, TreeSum()
        self._free[index] = []
        return accumulator

    def zero(self) -> None:
        super().zero()
        for index, accumulator in self._accumulators.items():
            # The first leaf is added into the sum that the tree's first node stays in.
            self._free[index].extend(self._trees[index].values[1:])
            self._trees[index] = TreeSum()
            accumulator.total = self._totals[index]

    def _arrived(self, index: int) -> None:
        done, of_leaf = divmod(self._arrivals[index] + 1, self.leaves.units)
        if of_leaf == 0:
            self._end_leaf(index, done)
        super()._arrived(index)

    @torch.no_grad()
    def _end_leaf(self, index: int, done: int) -> None:
        """Add the leaf that is complete, number `done` of this rank, and begin the next one."""
        accumulator, tree, free = self._accumulators[index], self._trees[index], self._free[index]
        leaf = self.leaves.of(self.dp.rank)[done - 1]
        free.extend(tree.add(Node(0, leaf), accumulator.total))

        if done < self.leaves.per_rank:
            accumulator.total = free.pop() if free else torch.empty_like(accumulator.total)
            accumulator.total.zero_()
            return

        if self.dp.size == 1:
            free.extend(tree.root())
        # What strikes a complete gradient must strike what is sent.
        accumulator.total = tree.values[-1]

    @torch.no_grad()
    def _start(self) -> None:
        bucket = self._buckets[self._started]
        count = max(len(held) for held in self._nodes)
        # Zeros where a block is short, or where another rank has more nodes.
        transfer = self.shard.new_zeros(self.dp.size, count, bucket.elements)
        for slot in bucket.slots:
            for at, value in enumerate(self._trees[self._index[id(slot.parameter)]].values):
                for into, rows in self.shard_layout.each_block(
                    transfer[:, at], slot, slot.param_slice.of(value), bucket.start
                ):
                    into.copy_(rows)

        self._pending.append((bucket, self._exchange(transfer)))
        self._started += 1

    def _exchange(self, transfer: Tensor) -> Pending:
        """Send each rank its rows of all nodes [dp, nodes, n], and add them to [n]. Collective.

        Runs in the background with `dp.overlap`.
        """
        received, out = torch.empty_like(transfer), transfer.new_empty(transfer.shape[2])
        name = f"exchange of gradients {self.dp.name}"
        wait = not self.dp.overlap
        with collective_scope(self.dp.comm, name):
            work = dist.all_to_all_single(
                received.view(-1), transfer.view(-1), group=self.dp.group, async_op=not wait
            )

        pending = Pending(out, work, partial(add_ranks, received, self._nodes, out), self.dp, name)
        if wait:
            pending.wait()
        return pending

    def local_sums(self) -> tuple[list[Tensor], list[Tensor]]:
        own, shared = list[Tensor](), list[Tensor]()
        for slot in self.shard_layout.slots:
            summed = self.tp.size > 1 and slot.param_slice.sum_over_tensor
            held = self._trees[self._index[id(slot.parameter)]].values
            (shared if summed else own).extend(map(slot.param_slice.of, held))
        return own, shared

    def full(self, slot: BufferSlot) -> Tensor:
        nodes = len(self._nodes[self.dp.rank])
        assert nodes == 1, f"{slot.param_slice.name}: the sum of this rank is in {nodes} parts"
        return super().full(slot)
