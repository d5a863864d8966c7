"""Collectives and their autograd pairs against their definitions over all ranks.

A wrong partner gives right outputs and wrong gradients. Values are small integers in float64, so
every sum is exact and equality is equality.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k2train.launch.environment import Launch
from k2train.parallel.collectives import (
    all_gather,
    all_gather_start,
    all_reduce,
    all_reduce_start,
    leave_parallel,
    reduce_scatter,
    reduce_scatter_start,
)
from k2train.parallel.grid import SINGLE, Axis
from tests.support.gloo_pool import GlooPool

LENGTH = 8
PAIRS = ("reduce_out", "scatter_out")


def whole_numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


def given(pair: str, size: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank puts in, and the gradient it gets back."""
    rows_out = LENGTH // size if pair == "scatter_out" else LENGTH
    return whole_numbers(10 * rank, LENGTH, 2, 3), whole_numbers(10 * rank + 1, rows_out, 2, 3)


def pairs_job(launch: Launch) -> dict[str, Any]:
    axis = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD)
    found: dict[str, Any] = {}
    for pair in PAIRS:
        x, grad = given(pair, axis.size, axis.rank)
        # Not contiguous, as activations that were transposed are.
        leaf = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        y = leave_parallel(leaf, replace(axis, sequence=pair == "scatter_out"))
        kept = leaf.detach().clone(), grad.clone()
        y.backward(grad)
        assert torch.equal(leaf, kept[0]), f"{pair} wrote into its input"
        assert torch.equal(grad, kept[1]), f"{pair} wrote into the gradient it was given"
        found[pair] = (y.detach().numpy(), leaf.grad.numpy())

    peak = all_reduce(torch.tensor([float(axis.rank)]), axis, dist.ReduceOp.MAX)
    found["max"] = peak.item()
    found["again"] = reduce_scatter(
        all_gather(torch.full((2, 3), float(axis.rank)), axis), axis
    ).numpy()

    try:
        reduce_scatter(torch.zeros(axis.size + 1, 2), axis)
    except AssertionError as error:
        found["uneven"] = str(error)

    return found


def expected(pair: str, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, grads = zip(*(given(pair, size, rank) for rank in range(size)), strict=True)
    if pair == "reduce_out":
        return [(torch.stack(inputs).sum(0), grad) for grad in grads]
    return [(part, torch.cat(grads)) for part in torch.stack(inputs).sum(0).chunk(size)]


@pytest.mark.parametrize("size", (2, 4))
def test_forward_and_backward_by_definition(pool: GlooPool, size: int) -> None:
    """Catches a backward that is the identity where a sum is due, blocks in the wrong order, and a
    sum made in place.
    """
    found = pool.run(size, pairs_job)
    for pair in PAIRS:
        for rank, (y, grad) in enumerate(expected(pair, size)):
            assert torch.equal(torch.from_numpy(found[rank][pair][0]), y), (
                f"{pair} forward on rank {rank}"
            )
            assert torch.equal(torch.from_numpy(found[rank][pair][1]), grad), (
                f"{pair} backward on rank {rank}"
            )

    assert [part["max"] for part in found] == [size - 1.0] * size
    for rank, part in enumerate(found):
        assert (part["again"] == rank * size).all(), (
            "all_gather then reduce_scatter is times the number of ranks"
        )
        assert f"must be divisible by tp {rank}/{size}" in part["uneven"]


@pytest.mark.parametrize("sequence", (False, True))
def test_one_rank_needs_no_group(sequence: bool) -> None:
    """Catches a collective on an axis of one, which has no group to run on."""
    x = torch.ones(4, 2, 3, requires_grad=True)
    assert leave_parallel(x, replace(SINGLE["tp"], sequence=sequence)) is x
    assert all_reduce(x.detach(), SINGLE["tp"]).equal(x)


def started_job(launch: Launch, dtype: torch.dtype) -> list[Any]:
    """Every collective at once and begun ahead, on one group: two of them under way together,
    waited for in turn.
    """
    axis = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD)
    found: list[Any] = []
    for wait in (True, False):
        x = whole_numbers(axis.rank, axis.size * 4, 3).to(dtype)
        # Every second column of a wider tensor: what is sent must not be what happens to lie in
        # between.
        gaps = whole_numbers(axis.rank, 4, 6).to(dtype)[:, ::2]
        summed, most = x.clone(), gaps.clone()
        pending = [
            all_reduce_start(summed, axis, wait=wait),
            all_gather_start(gaps, axis, wait=wait),
            reduce_scatter_start(x, axis, wait=wait),
            all_reduce_start(most, axis, dist.ReduceOp.MAX, wait=wait),
            all_reduce_start(x.sum(), axis, wait=wait),
        ]
        found.append([p.wait().double().tolist() for p in pending])
        assert pending[0].wait() is summed, "an all-reduce is in place"
        assert [p.wait().double().tolist() for p in pending] == found[-1], (
            "waiting again did something again"
        )

    return found


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("size", (2, 3, 4))
def test_begun_ahead_or_at_once(pool: GlooPool, size: int, dtype: torch.dtype) -> None:
    """Catches a swap of two that sends the wrong half, a sum made twice or before it has come,
    blocks in a wrong place.
    """
    xs = [whole_numbers(rank, size * 4, 3) for rank in range(size)]
    gaps = [whole_numbers(rank, 4, 6)[:, ::2] for rank in range(size)]
    whole = torch.stack(xs).sum(0)

    for rank, found in enumerate(pool.run(size, started_job, dtype)):
        wanted = [
            whole,
            torch.cat(gaps),
            whole.chunk(size)[rank],
            torch.stack(gaps).amax(0),
            whole.sum().to(dtype),
        ]
        for at_once_or_ahead in found:
            for values, want in zip(at_once_or_ahead[:4], wanted[:4], strict=True):
                assert values == want.tolist()
            assert at_once_or_ahead[4] == pytest.approx(float(whole.sum()), rel=0.02)


def rounding_job(launch: Launch) -> list[float]:
    axis = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD)
    x = torch.full((axis.size, 1), 256.0 if axis.rank == 0 else 0.5, dtype=torch.bfloat16)
    return reduce_scatter(x, axis).flatten().tolist()


def test_narrow_sums_are_rounded_once(pool: GlooPool) -> None:
    """Catches a bf16 sum that is rounded at every rank: 256 + 3 halves is 258 in bf16, and 256 when
    each half is lost.
    """
    assert pool.run(4, rounding_job) == [[258.0]] * 4
