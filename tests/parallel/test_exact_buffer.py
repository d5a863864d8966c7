"""Exact gradient buffer: the same tree of leaves on any number of data-parallel ranks."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from k2train.launch.environment import Launch
from k2train.parallel.exact_buffer import ExactGradientBuffer, Leaves
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.parallel.grid import SINGLE, Axis
from tests.parallel.test_exact_sum import by_recursion
from tests.parallel.test_grad_buffer import Toy
from tests.support.gloo_pool import GlooPool

CPU = torch.device("cpu")
UNITS = 24
STEPS = 2


def gradient(name: str, shape: tuple[int, ...], unit: int, step: int) -> torch.Tensor:
    seed = sum(map(ord, name)) + 1000 * unit + 100_000 * step
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if name == "fused":
        found[7] = 0.0
    return found


def reduce_job(launch: Launch, units_per_leaf: int, overlap: bool) -> dict[str, Any]:
    """The last of two steps of this rank's units: its rows of every slice."""
    toy = Toy()
    dp = Axis("dp", launch.world_size, launch.rank, dist.group.WORLD, overlap=overlap)
    own = UNITS // launch.world_size
    leaves = Leaves(own // units_per_leaf, units_per_leaf)
    buffer = ExactGradientBuffer([toy], dp, SINGLE["tp"], CPU, leaves, bucket_bytes=300)
    for step in range(STEPS):
        buffer.zero()
        for unit in range(launch.rank * own, (launch.rank + 1) * own):
            for name, parameter in toy.named_parameters():
                accumulator = accumulator_of(parameter)
                assert accumulator is not None, "no accumulator was attached"
                accumulator.add(gradient(name, tuple(parameter.shape), unit, step))
                accumulator.complete()
        shard = buffer.reduce()

    layout = buffer.shard_layout
    kept = sum(len(free) for free in buffer._free.values())
    return {
        "rows": {s.param_slice.name: s.rows(dp) for s in layout.slots},
        "shards": {
            s.param_slice.name: layout.local(shard, s).clone().numpy() for s in layout.slots
        },
        "kept": kept + sum(len(tree.values) - 1 for tree in buffer._trees.values()),
    }


def wanted(units_per_leaf: int) -> dict[str, np.ndarray]:
    """Whole gradients: units of a leaf one after another, leaves as the tree's text says."""
    found = {}
    for name, parameter in Toy().named_parameters():
        units = [gradient(name, tuple(parameter.shape), u, STEPS - 1) for u in range(UNITS)]
        leaves = []
        for first in range(0, UNITS, units_per_leaf):
            total = torch.zeros_like(units[0])
            for unit in units[first : first + units_per_leaf]:
                total += unit
            leaves.append(total)
        root = by_recursion(torch.stack(leaves), 5, 0)
        assert root is not None
        if name == "fused":
            found |= {"upper": root[:4].numpy(), "lower": root[4:7].numpy()}
        else:
            found[name] = root.numpy()
    return found


@pytest.mark.parametrize("world", (1, 2, 3, 4))
def test_any_number_of_ranks_adds_the_same_tree(pool: GlooPool, world: int) -> None:
    """To the bit. Catches an order of ranks, a short block, a node that is left out, and a sum
    that keeps something of the step before.
    """
    cases = [(units, overlap) for units in (1, 2) for overlap in (False, True)]
    for units, overlap in cases:
        expected = wanted(units)
        for part in pool.run(world, reduce_job, units, overlap):
            for name, (start, stop) in part["rows"].items():
                assert np.array_equal(part["shards"][name], expected[name][start:stop]), (
                    f"{name}, {units} units a leaf, overlap {overlap}"
                )


def test_memory_is_a_sum_for_each_level(pool: GlooPool) -> None:
    """Catches sums that are made anew in every leaf. 24 leaves need at most 4 more at a time."""
    parameters = len(list(Toy().parameters()))
    (one,), many = pool.run(1, reduce_job, 1, False), pool.run(4, reduce_job, 6, False)
    assert one["kept"] == 4 * parameters
    assert all(part["kept"] == 0 for part in many), "one leaf a rank needs no other sum"
