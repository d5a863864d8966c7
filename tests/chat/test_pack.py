"""`chat/pack.py`: catches a conversation that is lost, split or placed by the files' order."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from k2train.chat.pack import best_fit, pack


@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(40, 60))
def test_every_conversation_has_one_place(sizes: list[int], row: int) -> None:
    """Catches an overfull row, and a conversation in no row or in two."""
    keys = np.random.default_rng(len(sizes)).permutation(len(sizes)).astype(np.uint64)
    rows = best_fit(sizes, keys, row)
    assert sorted(index for one in rows for index in one) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in one) <= row for one in rows)
    # What began a row fitted into no earlier one: no two rows can be joined.
    rooms = sorted(row - sum(sizes[i] for i in one) for one in rows)
    assert len(rows) < 2 or rooms[-1] + rooms[-2] < row


@given(st.permutations(range(30)))
def test_the_order_of_the_files_does_not_count(order: list[int]) -> None:
    """Catches rows that change when a file is named before another one."""
    rng = np.random.default_rng(3)
    sizes, keys = rng.integers(1, 9, 30), rng.permutation(30).astype(np.uint64)

    def named(sizes: np.ndarray, keys: np.ndarray) -> list[list[int]]:
        return [[int(keys[i]) for i in one] for one in best_fit(sizes, keys, 16)]

    assert named(sizes, keys) == named(sizes[order], keys[order])


def test_small_ones_fill_the_room_of_large_ones() -> None:
    """Catches first fit: 10 would go beside 5 and 6 into a row of its own."""
    keys = np.arange(4, dtype=np.uint64)
    assert sorted(best_fit([10, 6, 5, 9], keys, 15)) == [[0, 2], [1, 3]]


def test_epochs_have_the_same_conversations_in_other_rows() -> None:
    """Catches an epoch that repeats its rows, lacks a conversation, or has one that is held out."""
    rng = np.random.default_rng(5)
    sizes, keys = rng.integers(1, 9, 200), rng.permutation(200).astype(np.uint64)
    rows, held_out = pack(sizes, keys, 32, held_out=3, epochs=3)
    epochs = [[row.conversations for row in rows if row.epoch == epoch] for epoch in range(3)]
    away = {index for row in held_out for index in row.conversations}
    assert len(held_out) == 3 and away
    for packed in epochs:
        assert sorted(i for row in packed for i in row) == sorted(set(range(200)) - away)
    alike = [set(map(tuple, one)) & set(map(tuple, two)) for one, two in pairwise(epochs)]
    assert all(len(same) < 3 for same in alike)
    few, all_held_out = pack(np.full(2, 30), keys[:2], 32, held_out=3, epochs=2)
    assert few == [] and len(all_held_out) == 2
