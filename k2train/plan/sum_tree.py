"""Nodes of a fixed binary sum tree, and how many sums a rank holds while it adds its leaves.

- A node (level, index) covers the leaves from index * 2**level on, 2**level of them, as far as
  there are so many. Its value is its left half plus its right half.
- Leaves come in their order. A stack holds the nodes that wait for their other half.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """Node of the tree: the leaves from index * 2**level on."""

    level: int
    index: int

    @property
    def is_right(self) -> bool:
        """Whether it is the right half of its parent."""
        return self.index % 2 == 1

    @property
    def left_half(self) -> "Node":
        """The left half of the parent of this right half."""
        return Node(self.level, self.index - 1)

    @property
    def parent(self) -> "Node":
        """The node of twice as many leaves that this one is a half of."""
        return Node(self.level + 1, self.index // 2)


def add_node(stack: list[Node], node: Node) -> int:
    """Add a node to those of a stack, in their order; return how many sums that takes.

    Each sum is of the last two values of the stack: of a left half and its right half.
    """
    count = 0
    while node.is_right and stack and stack[-1] == node.left_half:
        stack.pop()
        node, count = node.parent, count + 1
    stack.append(node)
    return count


def nodes_of(leaves: range) -> tuple[Node, ...]:
    """Return the nodes that the sum of a range of leaves consists of."""
    stack: list[Node] = []
    for leaf in leaves:
        add_node(stack, Node(0, leaf))
    return tuple(stack)


def most_sums(leaves: range) -> int:
    """Return how many sums exist at most while a range of leaves is added, the newest included."""

    def sums() -> Iterator[int]:
        stack: list[Node] = []
        for leaf in leaves:
            yield len(stack) + 1
            add_node(stack, Node(0, leaf))

    return max(sums(), default=0)
