"""Fixed tree of sums: which additions it makes, wherever its leaves are."""

from math import fsum, log2

import pytest
import torch
from torch import Tensor

from k2train.parallel.exact_sum import TreeSum, add_ranks
from k2train.plan.sum_tree import Node, nodes_of

COUNTS = (1, 2, 3, 7, 12, 24)


def by_recursion(leaves: Tensor, level: int, index: int) -> Tensor | None:
    """The value of a node as the module's text defines it: left half plus right half."""
    if level == 0:
        return leaves[index] if index < len(leaves) else None
    left, right = (by_recursion(leaves, level - 1, 2 * index + half) for half in (0, 1))
    return left if left is None or right is None else left + right


def leaves_of(count: int) -> Tensor:
    return torch.randn(count, 1000, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", COUNTS)
def test_every_number_of_ranks_gives_the_tree(count: int) -> None:
    """Catches a rank that adds across the border of a node, and nodes added in another order."""
    leaves = leaves_of(count)
    wanted = by_recursion(leaves, 5, 0)
    assert wanted is not None
    for ranks in (n for n in range(1, count + 1) if count % n == 0):
        held, values = [], []
        for rank in range(ranks):
            own = range(rank * count // ranks, (rank + 1) * count // ranks)
            tree = TreeSum()
            for leaf in own:
                tree.add(Node(0, leaf), leaves[leaf].clone())
            held.append(nodes_of(own))
            assert len(held[-1]) == len(tree.values)
            values.append(tree.values)

        received = torch.full((ranks, max(map(len, held)), 1000), float("nan"))
        for rank, own_values in enumerate(values):
            received[rank, : len(own_values)] = torch.stack(own_values)
        out = torch.empty(1000)
        add_ranks(received, held, out)
        assert torch.equal(out, wanted), f"{ranks} ranks"


def test_an_order_of_its_own_is_another_sum() -> None:
    """The numbers above do depend on the order: one after another they give other bits."""
    leaves = leaves_of(24)
    wanted, chain = by_recursion(leaves, 5, 0), leaves[0].clone()
    for leaf in leaves[1:]:
        chain += leaf
    assert wanted is not None and not torch.equal(wanted, chain)

    # Against exact sums, the tree is no worse: log2(n) roundings instead of n.
    exact = torch.tensor([fsum(column) for column in leaves.double().t().tolist()])
    size = leaves.abs().sum(0) * 2.0**-24
    errors = [((value.double() - exact).abs() / size).max() for value in (wanted, chain)]
    assert errors[0] <= log2(32) and errors[0] <= errors[1]
