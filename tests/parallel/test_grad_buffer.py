"""Gradient buffer: reduction equal to no sharding, each bucket when all of it is in."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from k2train.launch.environment import Launch
from k2train.parallel import grad_buffer
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.parallel.grad_buffer import GradientBuffer
from k2train.parallel.grid import SINGLE, Axis
from k2train.parallel.param_gather import ParamGather
from k2train.parallel.shard import ParamSlice, Sharded
from tests.support.gloo_pool import GlooPool

CPU = torch.device("cpu")
# name -> (shape, weight decay, gradient partial over tensor-parallel ranks); rows that no degree
# divides, and fewer rows than ranks. `fused` holds two slices and a padding row.
TENSORS = {
    "square": ((5, 3), True, False),
    "norm": ((7,), False, True),
    "one": ((1, 4), True, False),
    "two": ((2, 2), True, False),
    "bias": ((3,), False, False),
}


class Toy(Sharded):
    """Parameters of odd shapes, and one stack of two slices with a padding row."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.slices = {}
        for name, (shape, decay, partial) in TENSORS.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
            self.slices[name] = (
                ParamSlice(name, shape, None, 0, shape[0], 0, 1.0, decay, partial),
            )

        self.fused = nn.Parameter(torch.zeros(8, 2, dtype=dtype))
        self.slices["fused"] = (
            ParamSlice("upper", (4, 2), None, 0, 4, 0, 1.0, True),
            ParamSlice("lower", (3, 2), None, 0, 3, 4, 1.0, True),
        )


def gradient(name: str, shape: tuple[int, ...], rank: int, microbatch: int) -> torch.Tensor:
    seed = sum(map(ord, name)) + 1000 * rank + 100 * microbatch
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def accumulate(toy: Toy, rank: int, num_microbatches: int) -> None:
    """Half of the parameters by autograd, half by layers that add to the accumulator themselves;
    each rank in another order.
    """
    names = dict(toy.named_parameters())
    turned = list(names)[rank:] + list(names)[:rank]
    for microbatch in range(num_microbatches):
        for name in turned:
            weights = gradient(name, tuple(names[name].shape), rank, microbatch)
            if name == "fused":
                weights[7] = 0.0

            if name in ("square", "fused", "norm"):
                accumulator = accumulator_of(names[name])
                assert accumulator is not None, "no accumulator was attached"
                accumulator.add(weights[:2])
                accumulator.add(weights[2:], first_row=2)
                accumulator.complete()
            else:
                (names[name] * weights).sum().backward()


COUNTS = {None: 2, 300: 3, 1: 5}
"""Bytes a rank in a bucket (64 elements a parameter: 256 bytes) -> buckets, the one of what does
not decay included.
"""
CASES = [(m, size, overlap) for m in (1, 2) for size in COUNTS for overlap in (False, True)]


def reduce_job(launch: Launch) -> list[dict[str, Any]]:
    sizes = [None if size is None else size * launch.world_size for _, size, _ in CASES]
    return [
        reduce_once(launch, m, size, overlap)
        for (m, _, overlap), size in zip(CASES, sizes, strict=True)
    ]


def reduce_once(
    launch: Launch, num_microbatches: int, bucket_bytes: int | None, overlap: bool
) -> dict[str, Any]:
    """Two steps, the second reduced; the sum published as if it were the new weights."""
    toy = Toy()
    dp = Axis("dp", launch.world_size, launch.rank, dist.group.WORLD, overlap=overlap)
    buffer = GradientBuffer([toy], dp, SINGLE["tp"], CPU, num_microbatches, bucket_bytes)
    left, begin = [], grad_buffer.reduce_scatter_start

    def watched(transfer: torch.Tensor, axis: Axis, wait: bool = False) -> Any:
        left.append((tuple(transfer.shape), sum(buffer._arrivals)))
        return begin(transfer, axis, wait)

    grad_buffer.reduce_scatter_start = watched
    try:
        accumulate(toy, launch.rank, num_microbatches)
        buffer.reduce().add_(1.0)
        buffer.zero()
        left.clear()
        accumulate(toy, launch.rank, num_microbatches)
        assert all(parameter.grad is None for parameter in toy.parameters()), (
            "gradients are kept twice"
        )
        alone = {
            slot.param_slice.name: buffer.full(slot).numpy() for slot in buffer.shard_layout.slots
        }
        early = len(left)
        shard = buffer.reduce()
    finally:
        grad_buffer.reduce_scatter_start = begin

    param_gather = ParamGather(buffer.shard_layout)
    for bucket in buffer.shard_layout.buckets(bucket_bytes):
        param_gather.start(bucket, shard[bucket.start : bucket.stop])

    param_gather.finish()
    return {
        "alone": alone,
        "rows": {slot.param_slice.name: slot.rows(dp) for slot in buffer.shard_layout.slots},
        "shards": {
            slot.param_slice.name: buffer.shard_layout.local(shard, slot).clone().numpy()
            for slot in buffer.shard_layout.slots
        },
        "published": {
            name: parameter.detach().numpy() for name, parameter in toy.named_parameters()
        },
        "buckets": [shape for shape, _ in left],
        "early": early,
        "gaps": float(
            shard.abs().sum()
            - sum(
                buffer.shard_layout.local(shard, s).abs().sum() for s in buffer.shard_layout.slots
            )
        ),
    }


def sums_over(ranks: int, num_microbatches: int = 2) -> dict[str, np.ndarray]:
    total = {}
    for name, parameter in Toy().named_parameters():
        shape = tuple(parameter.shape)
        total[name] = sum(
            gradient(name, shape, rank, m) for rank in range(ranks) for m in range(num_microbatches)
        ).numpy()
    total["fused"][7] = 0.0
    return total


@pytest.mark.parametrize("dp", (1, 2, 3, 4))
def test_reduce_and_publish_equal_no_sharding(pool: GlooPool, dp: int) -> None:
    """Catches a rank that gets another's rows, a gradient averaged or counted twice, one left over
    from the step before, buckets that leave as they come and so meet others, rows that publishing
    loses.
    """
    found = pool.run(dp, reduce_job)
    for case, (num_microbatches, size, overlap) in enumerate(CASES):
        parts, total = [part[case] for part in found], sums_over(dp, num_microbatches)
        by_piece = total | {"upper": total["fused"][:4], "lower": total["fused"][4:7]}
        for rank, part in enumerate(parts):
            for name, (start, stop) in part["rows"].items():
                assert np.array_equal(part["shards"][name], by_piece[name][start:stop]), (
                    f"{name} on rank {rank}"
                )

            for name, value in total.items():
                assert np.array_equal(part["published"][name], value), (
                    f"{name} published on rank {rank}"
                )

            assert part["gaps"] == 0.0, (
                "what lies between slices must stay 0, for the optimizer's sake"
            )
            assert part["buckets"] == parts[0]["buckets"]
            assert len(part["buckets"]) == (0 if dp == 1 else COUNTS[size])
            # All but the last, which waits for the sum over tensor-parallel ranks.
            assert part["early"] == (len(part["buckets"]) - 1 if overlap and dp > 1 else 0)

        for name in parts[0]["alone"]:
            assert np.array_equal(sum(part["alone"][name] for part in parts), by_piece[name]), name


def test_a_bucket_leaves_only_when_all_of_it_is_in(pool: GlooPool) -> None:
    """Catches a reduction that starts one micro-batch early: what comes later would be lost without
    a word.
    """
    assert pool.run(2, early_job) == [[0, 0, 1], [0, 0, 1]]


def early_job(launch: Launch) -> list[int]:
    """How many buckets have left after each micro-batch but the last, before and after its last
    parameter.
    """
    toy, dp = Toy(), Axis("dp", 2, launch.rank, dist.group.WORLD, overlap=True)
    buffer = GradientBuffer([toy], dp, SINGLE["tp"], CPU, 2)
    counts = []

    for microbatch in range(2):
        for name, parameter in toy.named_parameters():
            if (microbatch, name) == (1, "fused"):
                counts.append(buffer._started)
            (parameter * gradient(name, tuple(parameter.shape), 0, 0)).sum().backward()
        counts.append(buffer._started)

    buffer.reduce()
    return counts


@pytest.mark.parametrize(("times", "complaint"), ((1, "1 of one"), (3, "3 of one")))
def test_a_gradient_that_is_missing_or_too_many_is_named(times: int, complaint: str) -> None:
    """Catches a layer that forgets a micro-batch, or tells of one twice: the mean would be wrong
    and nothing would say so.
    """
    toy = Toy()
    buffer = GradientBuffer([toy], SINGLE["dp"], SINGLE["tp"], CPU, num_microbatches=2)
    accumulate(toy, 0, 2)
    accumulator = accumulator_of(toy.one)
    assert accumulator is not None, "no accumulator was attached"

    if times == 1:
        buffer.zero()
        accumulate(toy, 0, 1)
        for name, parameter in toy.named_parameters():
            if name != "one":
                parameter.sum().backward()
    else:
        accumulator.complete()

    with pytest.raises(AssertionError, match=f"other than 2 times: {complaint}"):
        buffer.reduce()


def publish_job(launch: Launch) -> dict[str, Any]:
    """Overlapping gathers: what is seen of a module before and after it is waited for."""
    first, second = Toy(), Toy()
    rename(second)
    dp = Axis("dp", launch.world_size, launch.rank, dist.group.WORLD, overlap=True)
    buffer = GradientBuffer([first, second], dp, SINGLE["tp"], CPU)
    param_gather = ParamGather(buffer.shard_layout)
    shard = torch.ones(buffer.shard_layout.elements)
    for bucket in buffer.shard_layout.buckets(1):
        param_gather.start(bucket, shard[bucket.start : bucket.stop])

    counts = {"before": seen(first) + seen(second)}
    param_gather.wait_for(first)
    counts["first"] = seen(first)
    param_gather.wait_for(first)
    param_gather.wait_for(second)
    counts["second"] = seen(second)
    shard.fill_(2.0)
    for bucket in buffer.shard_layout.buckets(1):
        param_gather.start(bucket, shard[bucket.start : bucket.stop])

    param_gather.finish()
    counts["finished"] = seen(first) + seen(second)
    return counts


def rename(toy: Toy) -> None:
    toy.slices = {
        key: tuple(replace(param_slice, name=f"second.{param_slice.name}") for param_slice in held)
        for key, held in toy.slices.items()
    }


def seen(toy: Toy) -> list[float]:
    """Every different value in the parameters, the padding row of `fused` left out."""
    values = [
        parameter.detach() if name != "fused" else parameter.detach()[:7]
        for name, parameter in toy.named_parameters()
    ]
    return sorted(set(torch.cat([value.reshape(-1) for value in values]).tolist()))


@pytest.mark.parametrize("dp", (2, 3))
def test_weights_are_waited_for_at_their_first_use(pool: GlooPool, dp: int) -> None:
    """Catches a forward pass with the weights of the step before, and a gather whose rows never
    arrive.
    """
    for part in pool.run(dp, publish_job):
        assert part == {
            "before": [0.0, 0.0],
            "first": [1.0],
            "second": [1.0],
            "finished": [2.0, 2.0],
        }


def tensor_sum_job(launch: Launch) -> dict[str, np.ndarray]:
    toy, tp = Toy(), Axis("tp", launch.world_size, launch.rank, dist.group.WORLD)
    buffer = GradientBuffer([toy], SINGLE["dp"], tp, CPU)
    accumulate(toy, launch.rank, 2)
    shard = buffer.reduce()
    return {
        slot.param_slice.name: buffer.shard_layout.local(shard, slot).clone().numpy()
        for slot in buffer.shard_layout.slots
    }


def test_sequence_parallel_parts_are_summed_over_tensor_ranks(pool: GlooPool) -> None:
    """Catches a norm's gradient that stays a part of the sequence's, and a sum that takes others in
    with it.
    """
    parts = pool.run(2, tensor_sum_job)
    both = sums_over(2)
    for rank, part in enumerate(parts):
        assert np.array_equal(part["norm"], both["norm"])
        own = sum(gradient("square", (5, 3), rank, m) for m in range(2)).numpy()
        assert np.array_equal(part["square"], own), "what is whole on each rank must not be summed"


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """Catches a bf16 accumulator: past 256 it swallows a 1 whole."""
    toy = Toy(torch.bfloat16)
    buffer = GradientBuffer([toy], SINGLE["dp"], SINGLE["tp"], CPU)
    for _ in range(300):
        toy.one.sum().backward()
    shard = buffer.reduce()
    slot = next(slot for slot in buffer.shard_layout.slots if slot.param_slice.name == "one")
    assert shard.dtype == torch.float32
    assert buffer.shard_layout.local(shard, slot).tolist() == [[300.0] * 4]


def test_a_parameter_that_does_not_say_what_it_holds_is_refused() -> None:
    """Catches a parameter no optimizer or checkpoint would ever see."""
    toy = Toy()
    toy.stranger = nn.Parameter(torch.zeros(2))
    with pytest.raises(AssertionError, match="stranger has no slices"):
        GradientBuffer([toy], SINGLE["dp"], SINGLE["tp"], CPU)
