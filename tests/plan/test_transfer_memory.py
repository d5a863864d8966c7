"""Host memory of transfers: bytes by hand of a rank and of a machine."""

import pytest

from k2train.plan.layout import Layout
from k2train.plan.transfer_memory import (
    CHANNEL_BYTES,
    MESH_SIZES,
    PAIR_BYTES,
    machine_bytes,
    rank_bytes,
)

MIB = 2**20


def test_the_sizes_are_those_of_the_page() -> None:
    """Catches a block that grew, and a page that does not say so."""
    assert (PAIR_BYTES, CHANNEL_BYTES) == (4 * MIB, 16 * MIB)
    assert rank_bytes(Layout(max(MESH_SIZES), 1, 1), True) == 12 * MIB


@pytest.mark.parametrize(
    ("layout", "rank", "machine"),
    (
        (Layout(1, 1, 1), 0, 0),
        (Layout(2, 1, 1), 4, 4),
        (Layout(1, 1, 3), 8, 12),
        (Layout(4, 1, 1), 12, 24),
        (Layout(1, 1, 5), 0, 0),
        (Layout(1, 2, 1), 16, 16),
        (Layout(1, 4, 1), 0, 0),
        # Two pairs of tensor, two of data; two pairs of tensor, and two channels.
        (Layout(2, 1, 2), 8, 16),
        (Layout(2, 2, 1), 20, 40),
    ),
    ids=str,
)
def test_every_two_ranks_that_exchange_have_a_memory(
    layout: Layout, rank: int, machine: int
) -> None:
    """Catches an axis left out, a memory counted for both of its ranks, and one of too many ranks.

    In MiB.
    """
    assert rank_bytes(layout, True) == rank * MIB
    assert machine_bytes(layout, range(layout.world_size), True) == machine * MIB


def test_collectives_that_overlap_keep_gloo() -> None:
    """Catches memory planned for axes that do not use it; a pipeline's channel stays."""
    layout = Layout(2, 2, 2)
    assert rank_bytes(layout, False) == CHANNEL_BYTES
    assert machine_bytes(layout, range(8), False) == 4 * CHANNEL_BYTES


def test_ranks_of_other_machines_share_nothing() -> None:
    """Catches a mesh of the ranks that happen to be here, and channels between machines."""
    layout = Layout(2, 2, 1)
    assert machine_bytes(layout, [0, 1], True) == PAIR_BYTES
    assert machine_bytes(layout, [0, 2], True) == CHANNEL_BYTES
    assert machine_bytes(Layout(4, 1, 1), [0, 1, 2], True) == 0
