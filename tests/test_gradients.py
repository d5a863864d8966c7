"""The gradient buffer: every row of every piece in exactly one place, and one reduction equal to no sharding at all."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gloo import GlooPool
from k2train.parallel.environment import Launch
from k2train.parallel.gradients import ALIGN, GradientBuffer, SlotTable, publish
from k2train.parallel.grid import SINGLE, Axis
from k2train.parallel.shard import Piece, Sharded

CPU = torch.device("cpu")
# name -> (shape, weight decay, gradient partial over tensor-parallel ranks); rows that no degree divides, and fewer rows
# than ranks. `fused` holds two pieces and a padding row.
TENSORS = {
    "square": ((5, 3), True, False),
    "norm": ((7,), False, True),
    "one": ((1, 4), True, False),
    "two": ((2, 2), True, False),
    "bias": ((3,), False, False),
}


class Toy(Sharded):
    """Parameters of odd shapes, and one stack of two pieces with a padding row."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.pieces = {}
        for name, (shape, decay, partial) in TENSORS.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
            self.pieces[name] = (Piece(name, shape, None, 0, shape[0], 0, 1.0, decay, partial),)
        self.fused = nn.Parameter(torch.zeros(8, 2, dtype=dtype))
        self.pieces["fused"] = (
            Piece("upper", (4, 2), None, 0, 4, 0, 1.0, True),
            Piece("lower", (3, 2), None, 0, 3, 4, 1.0, True),
        )


pieces = st.builds(
    lambda rows, width, decay: (rows, width, decay), st.integers(0, 9), st.sampled_from([(), (1,), (3,)]), st.booleans()
)


def table_of(specs: list[tuple[int, tuple[int, ...], bool]], dp: int, rank: int) -> SlotTable:
    pairs = []
    for n, (rows, width, decay) in enumerate(specs):
        shape = (rows, *width)
        pairs.append((nn.Parameter(torch.zeros(shape)), Piece(f"t{n}", shape, None, 0, rows, 0, 1.0, decay)))
    return SlotTable(pairs, Axis("dp", dp, rank, None))


@settings(max_examples=60, deadline=None)
@given(st.lists(pieces, min_size=1, max_size=6), st.integers(1, 5))
def test_slots_cover_everything_once(specs: list[tuple[int, tuple[int, ...], bool]], dp: int) -> None:
    """Catches rows lost or held twice when they do not divide, a short block misplaced, halves that mix or do not align."""
    tables = [table_of(specs, dp, rank) for rank in range(dp)]
    table = tables[0]
    assert table.elements % ALIGN == 0 and table.decayed % ALIGN == 0
    lines = torch.full((dp, table.elements), -1.0)
    offset, values = 0, {}
    for slot in table.slots:
        rows = torch.arange(offset, offset + slot.parameter.numel(), dtype=torch.float32).view(slot.piece.shape)
        offset, values[slot.piece.name] = offset + rows.numel(), rows
        for held, given_rows in table.each_block(lines, slot, rows):
            assert (held == -1).all(), f"{slot.piece.name} lies over another piece"
            held.copy_(given_rows)
        assert (slot.offset + slot.elements <= table.decayed) == slot.piece.decay or slot.elements == 0
    assert int((lines >= 0).sum()) == offset, "values lost or written twice"
    for slot_index, slot in enumerate(table.slots):
        held = [t.local(lines[rank], t.slots[slot_index]) for rank, t in enumerate(tables)]
        assert torch.equal(torch.cat(held), values[slot.piece.name]), "ranks' rows do not make the piece"
        chunks = values[slot.piece.name].chunk(dp) if slot.piece.shape[0] else ()
        for rank, chunk in enumerate(chunks):
            assert torch.equal(held[rank], chunk), "not the rows of torch.chunk, which checkpoints rely on"


def gradient(name: str, shape: tuple[int, ...], rank: int, microbatch: int) -> torch.Tensor:
    seed = sum(map(ord, name)) + 1000 * rank + 100 * microbatch
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def accumulate(toy: Toy, rank: int, num_microbatches: int) -> None:
    for microbatch in range(num_microbatches):
        loss = torch.zeros(())
        for name, parameter in toy.named_parameters():
            weights = gradient(name, tuple(parameter.shape), rank, microbatch)
            if name == "fused":
                weights[7] = 0.0
            loss = loss + (parameter * weights).sum()
        loss.backward()


def reduce_job(launch: Launch) -> dict[str, Any]:
    """Two micro-batches a rank, reduced; the sum published as if it were the new weights."""
    toy, dp = Toy(), Axis("dp", launch.world_size, launch.rank, dist.group.WORLD)
    buffer = GradientBuffer([toy], dp, SINGLE["tp"], CPU)
    accumulate(toy, launch.rank, 2)
    assert all(parameter.grad is None for parameter in toy.parameters()), "gradients are kept twice"
    alone = {slot.piece.name: buffer.full(slot).numpy() for slot in buffer.table.slots}
    line = buffer.reduce()
    rows = {slot.piece.name: slot.rows(dp) for slot in buffer.table.slots}
    shards = {slot.piece.name: buffer.table.local(line, slot).clone().numpy() for slot in buffer.table.slots}
    publish(buffer.table, line)
    published = {name: parameter.detach().numpy() for name, parameter in toy.named_parameters()}
    buffer.zero()
    return {"alone": alone, "rows": rows, "shards": shards, "published": published, "zero": not buffer.lines.any()}


def sums_over(ranks: int) -> dict[str, np.ndarray]:
    total = {}
    for name, parameter in Toy().named_parameters():
        shape = tuple(parameter.shape)
        total[name] = sum(gradient(name, shape, rank, m) for rank in range(ranks) for m in range(2)).numpy()
    total["fused"][7] = 0.0
    return total


@pytest.mark.parametrize("dp", (1, 2, 3, 4))
def test_reduce_and_publish_equal_no_sharding(pool: GlooPool, dp: int) -> None:
    """Catches a rank that gets another's rows, a gradient averaged or counted twice, rows that publishing loses."""
    parts, total = pool.run(dp, reduce_job), sums_over(dp)
    by_piece = total | {"upper": total["fused"][:4], "lower": total["fused"][4:7]}
    for rank, part in enumerate(parts):
        for name, (start, stop) in part["rows"].items():
            assert np.array_equal(part["shards"][name], by_piece[name][start:stop]), f"{name} on rank {rank}"
        for name, value in total.items():
            assert np.array_equal(part["published"][name], value), f"{name} published on rank {rank}"
        assert part["zero"]
    for name in parts[0]["alone"]:
        assert np.array_equal(sum(part["alone"][name] for part in parts), by_piece[name]), name


def tensor_sum_job(launch: Launch) -> dict[str, np.ndarray]:
    toy, tp = Toy(), Axis("tp", launch.world_size, launch.rank, dist.group.WORLD)
    buffer = GradientBuffer([toy], SINGLE["dp"], tp, CPU)
    accumulate(toy, launch.rank, 2)
    line = buffer.reduce()
    return {slot.piece.name: buffer.table.local(line, slot).clone().numpy() for slot in buffer.table.slots}


def test_sequence_parallel_parts_are_summed_over_tensor_ranks(pool: GlooPool) -> None:
    """Catches a norm's gradient that stays a part of the sequence's, and a sum that takes others in with it."""
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
    line = buffer.reduce()
    slot = next(slot for slot in buffer.table.slots if slot.piece.name == "one")
    assert line.dtype == torch.float32
    assert buffer.table.local(line, slot).tolist() == [[300.0] * 4]


def test_a_parameter_that_does_not_say_what_it_holds_is_refused() -> None:
    """Catches a parameter no optimizer or checkpoint would ever see."""
    toy = Toy()
    toy.stranger = nn.Parameter(torch.zeros(2))
    with pytest.raises(AssertionError, match="stranger does not say what it holds"):
        GradientBuffer([toy], SINGLE["dp"], SINGLE["tp"], CPU)
