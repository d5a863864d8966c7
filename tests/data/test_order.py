"""Data order: arithmetic that is independent of ranks, micro-batches and restarts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2train.data.chunk import ChunkInfo, Manifest
from k2train.data.order import ChunkOrder, apply_events, make_order, rank_rows
from k2train.errors import DataError, RunError
from k2train.record.event import UnknownEvent
from k2train.record.events import ChunkDeferred, ChunkStarted
from k2train.record.rollback_events import RolledBack
from tests.support.events import entries, event


def manifest_of(rows: dict[str, int], sequence_length: int = 8) -> Manifest:
    chunks = tuple(
        ChunkInfo(name=n, file=f"{n}.npy", rows=r, tokens=r * sequence_length, sha256=n)
        for n, r in rows.items()
    )
    return Manifest(
        path=Path("data/manifest.json"),
        sha256="m",
        tokenizer_sha256="t",
        sequence_length=sequence_length,
        vocab_size=100,
        dtype="uint16",
        chunks=chunks,
    )


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
    to = data.draw(st.integers(i, len(order.names) - 1))
    last_before = order.first_step(i) - 1
    deferral = ChunkDeferred(attempt=1, chunk=order.names[i], step=last_before, order_index=to)
    after = apply_events(order, entries(deferral), "ledger")
    past = range(1, order.first_step(i))
    assert [after.sample_ids(s) for s in past] == [order.sample_ids(s) for s in past]
    assert sorted(after.names) == sorted(order.names)
    assert (after.names[to], after.rows[to]) == (order.names[i], order.rows[i])


def test_a_deferral_keeps_its_place_when_the_config_grows() -> None:
    """Catches a chunk already read that moves on when chunks are appended; other events count for
    nothing.
    """
    events = entries(
        event(ChunkStarted, chunk="b"),
        ChunkDeferred(attempt=1, chunk="b", step=1, order_index=2),
        UnknownEvent(unknown="chunk_moved", extra={"chunk": "a"}),
    )
    for names in ("abc", "abcd"):
        order = ChunkOrder(tuple(names), (2,) * len(names), 2)
        assert "".join(apply_events(order, events, "ledger").names) == "acb" + names[3:]
        assert apply_events(order, [], "ledger") == order


@pytest.mark.parametrize(
    ("chunk", "step", "to", "words"),
    (
        ("z", 0, 2, "'z', which the order does not have"),
        (
            "b",
            2,
            2,
            "'b' to position 2 after step 2; it begins with step 2 at position 1 of 0 to 2",
        ),
        ("b", 1, 3, "'b' to position 3 after"),
        ("c", 1, 1, "'c' to position 1 after"),
    ),
)
def test_a_deferral_that_does_not_fit_is_named(chunk: str, step: int, to: int, words: str) -> None:
    """Catches another run's deferral, and one that would change steps already trained."""
    order = ChunkOrder(("a", "b", "c"), (2, 2, 2), 2)
    deferral = ChunkDeferred(attempt=1, chunk=chunk, step=step, order_index=to)
    with pytest.raises(RunError, match=f"ledger: line 2 defers {words}"):
        apply_events(order, entries(event(ChunkStarted), deferral), "ledger")


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


def test_the_published_order_comes_out_of_two_returns() -> None:
    """Catches a deferral that ends elsewhere: K2 read chunks 0-15, 32-37, 44-51 and the rest
    ascending, and moved 160 and then 186 to the very end by hand.
    """
    first = [*range(16), *range(32, 38), *range(44, 52)]
    listed = [*first, *(n for n in range(360) if n not in first)]
    order = ChunkOrder(tuple(f"chunk_{n:03d}" for n in listed), (1,) * 360, 1)

    def back(chunk: str, before: ChunkOrder) -> RolledBack:
        step = before.first_step(before.names.index(chunk)) - 1
        return event(RolledBack, chunks=(chunk,), step=step, order_index=359)

    one = back("chunk_160", order)
    two = back("chunk_186", apply_events(order, entries(one), "ledger"))
    after = apply_events(order, entries(event(ChunkStarted), one, two), "ledger")
    rest = [n for n in listed if n not in (160, 186)]
    assert after.names == tuple(f"chunk_{n:03d}" for n in [*rest, 160, 186])


def test_a_return_after_a_bad_restart_moves_nothing() -> None:
    """Catches an order that changes although no data is blamed."""
    order = ChunkOrder(("a", "b"), (2, 2), 2)
    assert apply_events(order, entries(event(RolledBack, step=1)), "ledger") == order
