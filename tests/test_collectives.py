"""The conjugate pairs against their definitions over all ranks: a wrong partner gives right outputs and wrong gradients.

Values are small whole numbers in float64, so every sum is exact and equality is equality.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from gloo import GlooPool
from k2train.parallel.collectives import all_gather, all_reduce, enter_parallel, leave_parallel, reduce_scatter
from k2train.parallel.environment import Launch
from k2train.parallel.grid import SINGLE, Axis

LENGTH = 8
PAIRS = ("copy_in", "reduce_out", "gather_in", "scatter_out")


def whole_numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


def given(pair: str, size: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank puts in, and the gradient it gets back."""
    rows_in = LENGTH // size if pair == "gather_in" else LENGTH
    rows_out = LENGTH // size if pair == "scatter_out" else LENGTH
    return whole_numbers(10 * rank, rows_in, 2, 3), whole_numbers(10 * rank + 1, rows_out, 2, 3)


def pairs_job(launch: Launch) -> dict[str, Any]:
    axis = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD)
    found: dict[str, Any] = {}
    for pair in PAIRS:
        x, grad = given(pair, axis.size, axis.rank)
        apply = enter_parallel if pair in ("copy_in", "gather_in") else leave_parallel
        # Not contiguous, as activations that were transposed are.
        leaf = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        y = apply(leaf, axis, pair in ("gather_in", "scatter_out"))
        kept = leaf.detach().clone(), grad.clone()
        y.backward(grad)
        assert torch.equal(leaf, kept[0]), f"{pair} wrote into its input"
        assert torch.equal(grad, kept[1]), f"{pair} wrote into the gradient it was given"
        found[pair] = (y.detach().numpy(), leaf.grad.numpy())
    peak = all_reduce(torch.tensor([float(axis.rank)]), axis, dist.ReduceOp.MAX)
    found["max"] = peak.item()
    found["again"] = reduce_scatter(all_gather(torch.full((2, 3), float(axis.rank)), axis), axis).numpy()
    try:
        reduce_scatter(torch.zeros(axis.size + 1, 2), axis)
    except AssertionError as error:
        found["uneven"] = str(error)
    return found


def expected(pair: str, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, grads = zip(*(given(pair, size, rank) for rank in range(size)), strict=True)
    if pair == "copy_in":
        return [(x, torch.stack(grads).sum(0)) for x in inputs]
    if pair == "reduce_out":
        return [(torch.stack(inputs).sum(0), grad) for grad in grads]
    if pair == "gather_in":
        return [(torch.cat(inputs), part) for part in torch.stack(grads).sum(0).chunk(size)]
    return [(part, torch.cat(grads)) for part in torch.stack(inputs).sum(0).chunk(size)]


@pytest.mark.parametrize("size", (2, 4))
def test_forward_and_backward_by_definition(pool: GlooPool, size: int) -> None:
    """Catches a backward that is the identity where a sum is due, blocks in the wrong order, and a sum made in place."""
    found = pool.run(size, pairs_job)
    for pair in PAIRS:
        for rank, (y, grad) in enumerate(expected(pair, size)):
            assert torch.equal(torch.from_numpy(found[rank][pair][0]), y), f"{pair} forward on rank {rank}"
            assert torch.equal(torch.from_numpy(found[rank][pair][1]), grad), f"{pair} backward on rank {rank}"
    assert [part["max"] for part in found] == [size - 1.0] * size
    for rank, part in enumerate(found):
        assert (part["again"] == rank * size).all(), "all_gather then reduce_scatter is times the number of ranks"
        assert f"must be divisible by tp {rank}/{size}" in part["uneven"]


@pytest.mark.parametrize("sequence", (False, True))
def test_one_rank_needs_no_group(sequence: bool) -> None:
    """Catches a collective on an axis of one, which has no group to run on."""
    x = torch.ones(4, 2, 3, requires_grad=True)
    for apply in (enter_parallel, leave_parallel):
        assert apply(x, SINGLE["tp"], sequence) is x
    assert all_reduce(x.detach(), SINGLE["tp"]).equal(x)
