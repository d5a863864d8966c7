"""Packing of conversations into rows: whole ones, best fit, the longest first.

- A conversation goes to the fullest row that has room for it. None is split.
- The result depends on lengths and keys only, not on the order of the files.
- Each epoch is packed anew with other keys, so no two epochs have the same rows.

Alternatives considered:
- First fit in the order of the files: more padding, and the order of the files decides.
- Cutting what does not fit: an answer without its end, or a question without its answer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]


class Row(NamedTuple):
    """Numbers of the conversations of a row, and its epoch, from 0."""

    epoch: int
    conversations: list[int]


def pack(
    lengths: npt.NDArray[np.int64], keys: Keys, row_tokens: int, held_out: int, epochs: int
) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on, epoch after epoch, and `held_out` rows that are in none of them.

    Fewer rows than `held_out` are all held out.
    """
    first = best_fit(lengths, keys, row_tokens)
    split = max(0, len(first) - held_out)
    kept, rest = first[:split], first[split:]
    rows = [Row(0, row) for row in kept]
    used = np.array(sorted(index for row in kept for index in row), dtype=np.int64)
    for epoch in range(1, epochs):
        packed = best_fit(lengths[used], epoch_keys(keys[used], epoch), row_tokens)
        rows += [Row(epoch, used[row].tolist()) for row in packed]
    return rows, [Row(0, row) for row in rest]


def epoch_keys(keys: Keys, epoch: int) -> Keys:
    """Other keys for another epoch: the mixing of SplitMix64 (Steele et al., 2014)."""
    mixed = keys + np.uint64(epoch * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def best_fit(
    lengths: Sequence[int] | npt.NDArray[np.int64], keys: Keys, row_tokens: int
) -> list[list[int]]:
    """Return rows of indices, packed best fit decreasing; equal lengths in the order of `keys`.

    Each length is at most `row_tokens`. Inside a row the conversations are in the order of their
    keys, and the rows are in the order of the keys of their longest ones.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.lexsort((keys, -sizes))
    rows: list[list[int]] = []
    # Rows by the room they have left, and a bit for each room that a row has.
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for index in order.tolist():
        size = int(sizes[index])
        assert 0 < size <= row_tokens, f"{size} tokens do not fit into a row of {row_tokens}"
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        if left := room - size:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left

    # The first one of a row is its longest: a draw of one key, however many conversations it has.
    rows.sort(key=lambda row: int(keys[row[0]]))
    return [sorted(row, key=lambda index: int(keys[index])) for row in rows]
