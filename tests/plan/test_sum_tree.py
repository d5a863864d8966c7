"""Nodes that a rank's leaves add up to, and the sums that it holds meanwhile."""

from k2train.plan.sum_tree import Node, most_sums, nodes_of


def test_a_power_of_two_is_one_node() -> None:
    """A rank then sends one sum, as much as without the tree."""
    assert nodes_of(range(8, 16)) == (Node(3, 1),)
    assert nodes_of(range(6, 12)) == (Node(1, 3), Node(2, 2))
    assert nodes_of(range(5)) == (Node(2, 0), Node(0, 4))


def test_sums_are_counted_while_they_wait() -> None:
    """By hand: with leaf 7 begun, 4 + 2 + 1 leaves wait in three sums."""
    assert [most_sums(range(n)) for n in (1, 2, 3, 4, 8, 16)] == [1, 2, 2, 3, 4, 5]
    assert most_sums(range(6, 12)) == 4, "6 and 7, 8 and 9, 10, and 11 itself"
