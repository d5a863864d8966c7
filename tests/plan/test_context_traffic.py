"""Context parallelism: bytes of an exchange by hand, and what is left of it beside attention."""

from dataclasses import replace

import pytest

from k2train.plan.context_traffic import KINDS, exchanges_of, merged_bytes
from k2train.plan.cost import ModelShape
from k2train.plan.efficiency import Constants
from k2train.plan.hardware import Cluster, Device, Link
from k2train.plan.layer_time import LayerTime
from k2train.plan.workload import Workload

RATE = 450e9
"""Bytes a second of a device to the next one of its node."""
DEVICE = Device("H", "hopper", {"bf16": 1e15}, 96e9, 2e12, 500.0)
CLUSTER = Cluster("c", DEVICE, (Link("nvlink", 8, RATE, 0.0),))
CONSTANTS = Constants(matmul=0.7, attention=0.4, inner_link=1.0, host_seconds=0.0)
LINKS = (1.0, 1.0)
SHAPE = ModelShape(32, 4096, 14336, 32, 8, 128256)
RING = Workload(SHAPE, 131072, 1, 2, data=2, context=4, recompute="full", zero=3)
TORCH = replace(RING, cp_exchange="torch")
BLOCK = 2 * 4096 * 32768
"""Elements of the keys and values of all heads: two tensors of 32,768 tokens."""


def test_torch_gathers_what_was_repeated_for_all_heads() -> None:
    """Catches the bytes of the key heads, which are a quarter, and gradients in two bytes."""
    (ring,) = exchanges_of(RING, CLUSTER, LINKS, False)
    (gathered,) = exchanges_of(TORCH, CLUSTER, LINKS, False)
    assert ring.seconds == pytest.approx(3 * 2 * BLOCK / 4 / RATE)
    assert gathered.seconds == pytest.approx(3 * 2 * BLOCK / RATE)
    # One of four blocks is computed meanwhile.
    assert (ring.beside, gathered.beside) == (1.0, 0.25)

    again, beside, last = exchanges_of(TORCH, CLUSTER, LINKS, True)
    assert again == gathered
    assert beside == (pytest.approx(3 * 4 * BLOCK / RATE), 0.75)
    assert last == (pytest.approx(4 * BLOCK / RATE), 0.0)


def test_gradients_wait_for_the_hop_between_nodes() -> None:
    """Catches a ring that crosses nodes at the rate of two neighbours in a node."""
    links = (Link("nvlink", 2, RATE, 0.0), Link("network", 0, RATE / 9, 0.0))
    crossing = Cluster("c", DEVICE, links)
    *_, last = exchanges_of(TORCH, crossing, LINKS, True)
    assert last.seconds == pytest.approx(9 * 4 * BLOCK / RATE)


def test_merged_blocks_are_counted_in_both_passes() -> None:
    """Catches a merge of the first block, which is there, and gradients of the output alone."""
    assert merged_bytes(TORCH, False) == 3 * 10 * BLOCK / 2
    assert merged_bytes(TORCH, True) == 4 * 3 * 10 * BLOCK / 2
    assert merged_bytes(RING, True) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_exchanges_nothing(kind: str) -> None:
    alone = replace(TORCH, context=1, cp_exchange=kind)
    assert exchanges_of(alone, CLUSTER, LINKS, True) == ()
    assert merged_bytes(alone, True) == 0


def test_a_layer_waits_for_what_no_block_hides() -> None:
    """Catches the last gradients hidden behind attention, and merges that take no time."""
    ring, torch = (LayerTime(work, CLUSTER, CONSTANTS) for work in (RING, TORCH))
    *hidden, last = exchanges_of(TORCH, CLUSTER, torch.links, True)
    found = torch.input_backward().terms
    assert found["context traffic"] == pytest.approx(
        last.seconds + CONSTANTS.exposed * sum(one.seconds for one in hidden)
    )
    merged = found["memory-bound"] - ring.input_backward().terms["memory-bound"]
    assert merged == pytest.approx(torch.moved(merged_bytes(TORCH, True)))
    plain = [
        LayerTime(replace(work, fused=False), CLUSTER, CONSTANTS).input_backward()
        for work in (RING, TORCH)
    ]
    slower = plain[1].terms["memory-bound"] - plain[0].terms["memory-bound"]
    assert slower == pytest.approx(CONSTANTS.eager * merged)
