"""Hash of a step's ids: the formula of its docstring, and what ranks find of each other."""

import random
import struct

import numpy as np
import pytest
import xxhash

from k2train.data.fed_ids import (
    FLAGS,
    NOT_LEARNED,
    agreed_ids,
    fingerprint_of_step,
    flags_of,
    sum_of_rows,
    with_labels,
)
from k2train.parallel.cross_entropy import IGNORE

ROWS, LENGTH = 12, 7


def batch(dtype: str = "int64") -> np.ndarray:
    return np.random.default_rng(3).integers(0, 60_000, (ROWS, LENGTH)).astype(dtype)


def by_hand(ids: np.ndarray) -> str:
    """The published formula, from bytes packed one number at a time."""
    rows = [b"".join(struct.pack("<I", token) for token in row) for row in ids.tolist()]
    total = sum(int(xxhash.xxh3_64(row, seed=i).hexdigest(), 16) for i, row in enumerate(rows))
    return f"{total % 2**64:016x}"


@pytest.mark.parametrize("dtype", ["int64", "uint16", "uint32", ">u4"])
def test_the_formula_whatever_the_numbers_are_stored_as(dtype: str) -> None:
    assert fingerprint_of_step(batch(dtype)) == by_hand(batch())


def test_labels_are_hashed_behind_the_ids() -> None:
    """Catches a mask that no step's record holds, and another label than the loss ignores."""
    ids, learned = batch("uint16"), batch() % 3 == 0
    rows = [
        [*row, *(token if mark else 2**32 - 100 for token, mark in zip(row, marks, strict=True))]
        for row, marks in zip(ids.tolist(), learned.tolist(), strict=True)
    ]
    assert fingerprint_of_step(with_labels(ids, learned)) == by_hand(np.array(rows))
    assert NOT_LEARNED == IGNORE


def test_rows_of_a_larger_array_are_hashed_as_rows() -> None:
    """Catches the bytes of a view's neighbours."""
    wide = np.zeros((2 * ROWS, 3 * LENGTH), dtype=np.int64)
    wide[::2, LENGTH : 2 * LENGTH] = batch()
    assert fingerprint_of_step(wide[::2, LENGTH : 2 * LENGTH]) == by_hand(batch())


def test_another_id_or_order_is_another_number() -> None:
    """Catches sums that two exchanged rows, or two exchanged ids, leave as they are."""
    ids = batch()
    found = {fingerprint_of_step(ids)}
    for change in ("rows", "columns", "id", "cut"):
        other = ids.copy()
        if change == "rows":
            other[[3, 4]] = other[[4, 3]]
        elif change == "columns":
            other[:, [1, 2]] = other[:, [2, 1]]
        elif change == "id":
            other[5, 5] += 1
        else:
            other = other[:-1]
        found.add(fingerprint_of_step(other))
    assert len(found) == 5


def summed(parts: list[list[float]]) -> list[float]:
    """What the exchange of a step makes of it: sums in fp64, in any order."""
    random.Random(1).shuffle(parts)
    return [float(sum(column)) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    ("shares", "replicas", "idle"), [(1, 1, 0), (3, 1, 0), (4, 2, 0), (2, 4, 6)]
)
def test_any_cut_gives_the_same_number(shares: int, replicas: int, idle: int) -> None:
    """Replicas read the same rows; idle ranks (inner pipeline stages) read none."""
    ids, size = batch(), ROWS // shares
    parts = [
        flags_of(sum_of_rows(ids[s * size : (s + 1) * size], s * size), counts=replica == 0)
        for s in range(shares)
        for replica in range(replicas)
    ]
    parts += [flags_of(None, False)] * idle
    assert all(len(part) == FLAGS for part in parts)
    fed = agreed_ids(summed(parts), shares)
    assert (fed.fingerprint, fed.alike) == (by_hand(ids), True)


def test_sums_of_many_ranks_are_exact() -> None:
    """Catches limbs that lose a bit in a sum: 4,096 ranks with the largest numbers there are."""
    parts = [flags_of(2**64 - 1, counts=True) for _ in range(4096)]
    assert agreed_ids(summed(parts), 4096).fingerprint == f"{4096 * (2**64 - 1) % 2**64:016x}"


def test_a_replica_that_was_fed_something_else_is_found() -> None:
    """Catches the check that looks at the counting rank alone."""
    ids, other = batch(), batch()
    other[7, 2] ^= 1
    good = [flags_of(sum_of_rows(ids, 0), counts=True), flags_of(sum_of_rows(ids, 0), False)]
    wrong = [good[0], flags_of(sum_of_rows(other, 0), False)]
    assert agreed_ids(summed(good), 1).alike
    assert not agreed_ids(summed(wrong), 1).alike
    # A reader is missing on one of two shares.
    assert not agreed_ids(summed([*good, flags_of(5, counts=True)]), 2).alike
