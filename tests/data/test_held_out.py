"""Held-out sets: which rows, and the subset of each by its provenance."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2train.data.held_out import HeldOutSet
from k2train.data.inspect.provenance import SEVERAL, subset_of_rows
from k2train.data.manifest import Manifest
from k2train.errors import DataError
from tests.support.data_folder import add_chunk, finish

LENGTH, VOCAB, ROWS = 8, 50, 6


def folder(path: Path, subsets: dict[str, int], pieces: dict[str, Any] | None) -> Manifest:
    ids = np.zeros((ROWS, LENGTH), dtype=int)
    chunk = add_chunk(path, "chunk_000", ids, VOCAB, subsets, pieces=pieces)
    return finish(path, [chunk], LENGTH, VOCAB)


def pieces(rows: list[int], subsets: list[str]) -> dict[str, Any]:
    count = len(rows)
    return {
        "row": rows,
        "start": [0] * count,
        "length": [1] * count,
        "subset": subsets,
        "source": ["s"] * count,
        "document": ["d"] * count,
    }


def test_each_row_has_the_subset_of_its_pieces(tmp_path: Path) -> None:
    """Catches rows that are shifted, and a row of two subsets that counts for one of them."""
    rows, subsets = [0, 0, 1, 2, 2, 3, 4, 5], ["a", "a", "b", "b", "a", "a", "b", "a"]
    manifest = folder(tmp_path, {"a": 24, "b": 24}, pieces(rows, subsets))
    expected = ["a", "b", SEVERAL, "a", "b", "a"]
    for count in (1, 3, ROWS):
        assert subset_of_rows(manifest, manifest.chunks[0], count) == expected[:count]


def test_a_chunk_of_one_subset_needs_no_provenance(tmp_path: Path) -> None:
    manifest = folder(tmp_path, {"a": ROWS * LENGTH}, None)
    assert subset_of_rows(manifest, manifest.chunks[0], 4) == ["a"] * 4


@pytest.mark.parametrize(
    ("found", "words"),
    (
        (None, "has no provenance"),
        (pieces([0, 1, 2, 4, 5], list("aabba")), "knows nothing of 1 of 6 rows"),
    ),
)
def test_rows_of_no_known_subset(tmp_path: Path, found: Any, words: str) -> None:
    """Catches a row that is left out of every subset without a word."""
    manifest = folder(tmp_path, {"a": 24, "b": 24}, found)
    with pytest.raises(DataError, match=words):
        subset_of_rows(manifest, manifest.chunks[0], ROWS)


@pytest.mark.parametrize(("limit", "rows"), ((None, 6), (0, 0), (4, 4), (6, 6), (7, 6)))
def test_rows_and_targets_of_a_set(tmp_path: Path, limit: int | None, rows: int) -> None:
    """Catches targets that count the last position of a row, which predicts nothing."""
    held_out = HeldOutSet.of("x", folder(tmp_path, {"a": 48}, None), limit)
    assert (held_out.rows, held_out.total_rows) == (rows, ROWS)
    assert [count for _, count in held_out.scored()] == ([rows] if rows else [])
