"""Data order: arithmetic that is independent of ranks, micro-batches and restarts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2train.data.chunk import ChunkInfo, Manifest
from k2train.data.order import ChunkOrder, make_order, rank_rows
from k2train.errors import DataError


def manifest_of(rows: dict[str, int], sequence_length: int = 8) -> Manifest:
    chunks = tuple(ChunkInfo(n, f"{n}.npy", r, r * sequence_length, {}, n) for n, r in rows.items())
    return Manifest(Path("data/manifest.json"), "m", "t", sequence_length, 100, "uint16", chunks)


orders = st.integers(1, 12).flatmap(
    lambda size: st.lists(st.integers(size, 5 * size), min_size=1, max_size=8).map(
        lambda rows: ChunkOrder(
            tuple(f"chunk_{i:03d}" for i in range(len(rows))), tuple(rows), size
        )
    )
)


@given(orders)
def test_every_row_once_in_order_and_never_across_chunks(order: ChunkOrder) -> None:
    """Catches off-by-one steps, repeated or skipped rows, steps that mix chunks, and lost drop
    counts.
    """
    seen: dict[str, list[int]] = {name: [] for name in order.names}
    names = []

    for step in range(1, order.total_steps + 1):
        index = order.position(step)
        assert index.name == order.names[index.order_index]
        assert order.first_step(index.order_index) + index.step_in_chunk == step
        assert len(order.rows_of(step)) == order.global_sequences
        seen[index.name] += order.rows_of(step)
        names.append(index.name)

    assert names == sorted(names)
    for i, name in enumerate(order.names):
        assert seen[name] == list(range(order.rows[i] - order.dropped_rows(i)))
        assert order.dropped_rows(i) < order.global_sequences


@given(orders)
def test_chunk_ends_are_the_numbered_checkpoints(order: ChunkOrder) -> None:
    """Catches a checkpoint a step early or late, and a count that forgets a chunk."""
    ends = [step for step in range(1, order.total_steps + 1) if order.is_chunk_end(step)]
    assert ends == [order.first_step(i) + order.steps_in(i) - 1 for i in range(len(order.names))]
    assert [order.consumed_chunks(step) for step in ends] == list(range(1, len(order.names) + 1))
    assert [order.consumed_chunks(step - 1) for step in ends] == list(range(len(order.names)))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 7))
def test_the_step_does_not_know_the_layout(
    micro: int, data: int, num_microbatches: int, step: int
) -> None:
    """Catches rows that depend on dp or the micro-batch: joined over ranks they are the step's
    rows, in order.
    """
    size = micro * data * num_microbatches
    rows = range(step * size, (step + 1) * size)
    parts = [rank_rows(rows, dp, data, micro) for dp in range(data)]
    assert [row for part in parts for microbatch in part for row in microbatch] == list(rows)
    assert all(len(microbatch) == micro for part in parts for microbatch in part)
    assert all(len(part) == num_microbatches for part in parts)


@given(orders, st.data())
def test_deferred_chunk_leaves_the_past_alone(order: ChunkOrder, data: st.DataObject) -> None:
    """Catches a rollback that changes steps already trained, or loses the deferred chunk."""
    i = data.draw(st.integers(0, len(order.names) - 1))
    after = order.deferred(i)
    past = range(1, order.first_step(i))
    assert [after.sample_ids(s) for s in past] == [order.sample_ids(s) for s in past]
    assert sorted(after.names) == sorted(order.names)
    assert (after.names[-1], after.rows[-1]) == (order.names[i], order.rows[i])


def test_indivisible_batch_tells_the_nearest() -> None:
    """Catches rows dropped in silence where the batch does not divide."""
    with pytest.raises(
        DataError, match=r"\(10\) must be divisible .*\(2 x 3 = 6\); nearest that are: 6, 12"
    ):
        rank_rows(range(10), 0, 2, 3)


def test_ascending_is_by_number() -> None:
    """Catches chunk_1000 being read before chunk_101."""
    manifest = manifest_of({"chunk_1000": 4, "chunk_101": 5, "chunk_002": 6})
    order = make_order(manifest, None, 2)
    assert (order.names, order.rows) == (("chunk_002", "chunk_101", "chunk_1000"), (6, 5, 4))


def test_explicit_order_by_name_or_number() -> None:
    """Catches numbers taken as places in a list, and rows that do not follow their chunk."""
    manifest = manifest_of({"chunk_007": 4, "chunk_003": 9, "chunk_005": 8})
    order = make_order(manifest, [5, "chunk_007"], 4)
    assert (order.names, order.rows) == (("chunk_005", "chunk_007"), (8, 4))
    assert order.sample_ids(3) == ["chunk_007:0", "chunk_007:1", "chunk_007:2", "chunk_007:3"]


@pytest.mark.parametrize(
    ("asked", "size", "length", "words"),
    [
        ([1, "chunk_001"], 2, None, "names chunk_001 more than once"),
        (["chunk_009"], 2, None, "names chunk_009, which .* 2 chunks, chunk_001 to chunk_002"),
        ([-1], 2, None, "does not have"),
        ([], 2, None, "is empty"),
        (
            None,
            5,
            None,
            r"chunk_002 has 4 rows, fewer than one step of batch.global_sequences \(5\)",
        ),
        (None, 2, 16, r"data.sequence_length \(16\) must be .* \(8\)"),
        (None, 0, None, "at least 1"),
    ],
)
def test_impossible_orders(
    asked: list[str | int] | None, size: int, length: int | None, words: str
) -> None:
    """Catches an order that would read a chunk twice, none, or another length of sequence."""
    with pytest.raises(DataError, match=words):
        make_order(manifest_of({"chunk_001": 8, "chunk_002": 4}), asked, size, length)


def test_steps_outside_the_data() -> None:
    """Catches negative indexing: step 0 must not be the last step."""
    order = make_order(manifest_of({"chunk_000": 8}), None, 4)
    for step in (0, 3, -1):
        with pytest.raises(DataError, match=f"step {step} is outside the data: .* 1 to 2"):
            order.rows_of(step)
