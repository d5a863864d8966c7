"""Sums in a fixed binary tree over leaves, whichever ranks the leaves are on.

- A node's value is its left half plus its right half (`k2train.plan.sum_tree`). So the value of the
  root is a function of the leaves alone: not of where they are, nor of how many a rank has.
- A rank that has a range of leaves adds what it can: its sum is a few nodes, one where its number
  of leaves is a power of two. Its peers get these nodes and add the rest of the same tree.
- The error of a sum of n numbers is at most log2(n) roundings of its parts, where adding one after
  another has n (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2).

Alternatives considered:
- Exact sums, in integers or in bins of fixed exponents (Demmel and Nguyen 2013,
  doi:10.1109/ARITH.2013.9): independent of any order, but 16 bytes a number instead of 4 in the
  gradients' sums and in their transfer, and five times their memory traffic in every micro-batch.
- Rounding to one grid, so that fp64 sums are exact: the grid must be known before the first
  gradient is, and a gradient beyond it means that the step is done again.
"""

from collections.abc import Sequence

from torch import Tensor

from k2train.plan.sum_tree import Node, add_node


class TreeSum:
    """Adds values of nodes, which come in the order of their leaves.

    Values are added in place: the first of all becomes the sum.
    """

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self.values: list[Tensor] = []
        """Value of each node that waits for its other half."""

    def add(self, node: Node, value: Tensor) -> list[Tensor]:
        """Add the value of a node; return the tensors that are free again."""
        count = add_node(self._nodes, node)
        self.values.append(value)
        return [self._add_last() for _ in range(count)]

    def root(self) -> list[Tensor]:
        """Add what is left, the end of the tree first; return the tensors that are free again."""
        return [self._add_last() for _ in range(len(self.values) - 1)]

    def _add_last(self) -> Tensor:
        right = self.values.pop()
        self.values[-1].add_(right)
        return right


def add_ranks(received: Tensor, nodes: Sequence[Sequence[Node]], out: Tensor) -> None:
    """Add the nodes of all ranks, received [ranks, nodes, n], into `out` [n].

    A rank with fewer nodes than others has them first. `received` is used up.
    """
    tree = TreeSum()
    for rank, held in enumerate(nodes):
        for at, node in enumerate(held):
            tree.add(node, received[rank, at])
    tree.root()
    out.copy_(tree.values[0])
