"""Links and rings: which link a group needs, and how long a collective takes on it."""

import pytest

from k2train.errors import ConfigError
from k2train.plan.hardware import Cluster, Device, Link

DEVICE = Device("A", "ampere", {"bf16": 1e12}, 1e9, 1e12, 400.0)
CLUSTER = Cluster("c", DEVICE, (Link("nvlink", 8, 100e9, 0.0), Link("network", 0, 10e9, 0.0)))
FULL = (1.0, 1.0)


def test_a_ring_moves_what_the_formula_says() -> None:
    """Catches an all-reduce counted once instead of twice, and a group's own share counted."""
    # 2 (n - 1) / n of the bytes (Patarasuk and Yuan 2009).
    assert CLUSTER.all_reduce_seconds(8e9, 8, 1, FULL) == pytest.approx(2 * 7 / 8 * 8e9 / 100e9)
    assert CLUSTER.gather_seconds(8e9, 8, 1, FULL) == pytest.approx(7e9 / 100e9)
    assert CLUSTER.gather_seconds(8e9, 1, 1, FULL) == 0.0


def test_ranks_of_a_node_share_its_ports() -> None:
    """Catches one port for a group that has a whole node, and eight for one that has a rank."""
    # 16 neighbours: 8 in a node, so 8 ports of 10 GB/s; 8 apart: one.
    assert CLUSTER.ring(16, 1, FULL)[0] == pytest.approx(80e9)
    assert CLUSTER.ring(4, 8, FULL)[0] == pytest.approx(10e9)
    assert CLUSTER.ring(4, 4, FULL)[0] == pytest.approx(20e9)
    # Many ports are not faster than the links inside.
    fast = Cluster("c", DEVICE, (CLUSTER.links[0], Link("network", 0, 90e9, 0.0)))
    assert fast.ring(16, 1, FULL)[0] == pytest.approx(100e9)


def test_a_domain_of_72_is_a_level_of_its_own() -> None:
    """Catches a rack whose NVLink is used for a node only."""
    rack = Cluster("r", DEVICE, (Link("nvlink", 72, 100e9, 0.0), Link("network", 0, 10e9, 0.0)))
    assert [rack.spans(72), rack.spans(73), rack.spans(9, 8), rack.spans(10, 8)] == [0, 1, 0, 1]


def test_a_missing_link_and_a_missing_precision_are_named() -> None:
    """Catches a group over a link that nobody described, and a peak of another precision."""
    alone = Cluster("alone", DEVICE, CLUSTER.links[:1])
    with pytest.raises(
        ConfigError, match=r"joins at most 8 devices, and a group of 16 .* needs 16"
    ):
        alone.spans(16)
    with pytest.raises(ConfigError, match="A has no peak for fp8; precisions it has: bf16"):
        DEVICE.peak("fp8")
