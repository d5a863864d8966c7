"""Longest verbatim matches of token sequences in one part of a chunk.

- One binary search for each position of the query, all positions at once: the two neighbors of the
  place where the rest of the query would be sorted have the longest common beginning with it.
- A comparison begins behind what both ends of the search have in common with the query, so long
  matches cost no more than short ones.
- Matches end with their row, and with the query that they are of.

Alternatives considered:
- Extending matches of a fixed number of tokens, token by token: text that repeats has millions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k2train.data.manifest import Manifest
from k2train.data.npy import read_header
from k2train.data.trace.index_files import Part, Suffixes, open_suffixes

WINDOW = 8
"""Tokens compared at once; most suffixes differ in the first few."""
BLOCK_POSITIONS = 2**16
"""Positions of queries that are searched at once; bounds the memory."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Queries:
    """Token sequences behind each other; `ends` has for each position where its sequence ends."""

    tokens: Ints
    ends: Ints
    begins: Ints
    """Positions at which a match may begin."""

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[int] | Ints], heads: Sequence[int] | None = None
    ) -> "Queries":
        """Join sequences; `heads`: at how many first positions of each a match may begin."""
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        tokens = np.concatenate([_NONE, *(np.asarray(s, dtype=np.int64) for s in sequences)])
        ends = np.cumsum(lengths)
        if heads is None:
            return cls(tokens, np.repeat(ends, lengths), np.arange(len(tokens)))

        firsts = (end - length for end, length in zip(ends, lengths, strict=True))
        begins = [np.arange(first, first + n) for first, n in zip(firsts, heads, strict=True)]
        return cls(tokens, np.repeat(ends, lengths), np.concatenate([_NONE, *begins]))


_NONE: Ints = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Span:
    """A longest match: `length` tokens of the queries from `start`, and how often they occur."""

    start: int
    length: int
    places: tuple["Place", ...]
    """The first ones, in the order of the chunks."""
    count: int

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        return self.start + self.length


@dataclass(frozen=True)
class Place:
    """Where a span occurs: chunk, row, position in the row and number of tokens there.

    `then` is where it goes on, if its document does in another row.
    """

    chunk: str
    row: int
    start: int
    length: int
    then: "Place | None" = None

    def rows(self) -> Iterator["Place"]:
        """Yield the places in one row each."""
        part: Place | None = self
        while part is not None:
            yield part
            part = part.then


class OpenPart:
    """One part that is searched: its suffix array and its tokens, both mapped into memory."""

    def __init__(self, manifest: Manifest, folder: Path, part: Part) -> None:
        self.part, self.row_length = part, manifest.sequence_length
        self.tokens = len(part.rows) * self.row_length
        self._open = (manifest, folder)

    @cached_property
    def suffixes(self) -> Suffixes:
        """The suffix array."""
        return open_suffixes(self._open[1], self.part, self.tokens)

    @cached_property
    def ids(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Ids of the part's rows, one after another."""
        manifest, _ = self._open
        path = manifest.folder / self.part.info.file
        offset = read_header(path, self.part.info.name).offset
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        first = self.part.rows.start * self.row_length * dtype.itemsize
        return np.memmap(path, dtype, mode="r", offset=offset + first, shape=(self.tokens,))

    def place(self, position: int, length: int) -> Place:
        """Place of `length` tokens from a position of the part."""
        row, start = divmod(position, self.row_length)
        return Place(self.part.info.name, self.part.rows.start + row, start, length)

    def lower_bounds(
        self, queries: Queries, starts: Ints, ends: Ints, after: bool = False
    ) -> tuple[Ints, Ints]:
        """Return for each query the place where it would be sorted, and its longest match there.

        A query is `tokens[start:end]`. Suffixes that begin with the whole query come behind that
        place, or in front of it with `after`.
        """
        low = np.zeros(len(starts), dtype=np.int64)
        high = np.full(len(starts), self.tokens, dtype=np.int64)
        low_match, high_match = np.zeros_like(low), np.zeros_like(low)

        active = np.flatnonzero(low < high)
        while len(active):
            middle = (low[active] + high[active]) // 2
            positions = self.suffixes[middle].astype(np.int64)
            known = np.minimum(low_match[active], high_match[active])
            match, below = self._compare(
                queries.tokens, starts[active], ends[active], positions, known, after
            )

            up, down = active[below], active[~below]
            low[up], low_match[up] = middle[below] + 1, match[below]
            high[down], high_match[down] = middle[~below], match[~below]
            active = active[low[active] < high[active]]
        return low, np.maximum(low_match, high_match)

    def _compare(
        self,
        tokens: Ints,
        starts: Ints,
        ends: Ints,
        positions: Ints,
        known: Ints,
        after: bool,
    ) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Compare suffixes with queries, of which `known` tokens agree.

        Returns how many agree, and whether the suffix is sorted in front of the query.
        """
        # How many tokens can be compared: to the end of the query, and to the end of the row.
        rest = ends - starts
        row_rest = self.row_length - positions % self.row_length
        most = np.minimum(rest, row_rest)

        match, open_, width = known.copy(), np.flatnonzero(known < most), WINDOW
        below = np.zeros(len(starts), dtype=np.bool_)
        while len(open_):
            offset = match[open_, None] + np.arange(width)
            valid = offset < most[open_, None]
            left = self.ids[np.where(valid, positions[open_, None] + offset, 0)].astype(np.int64)
            right = tokens[np.where(valid, starts[open_, None] + offset, 0)]
            differs = (left != right) | ~valid

            column = differs.argmax(axis=1)
            found = differs[np.arange(len(open_)), column]
            column = np.where(found, column, width)
            match[open_] += column
            real = found & valid[np.arange(len(open_)), np.minimum(column, width - 1)]
            rows = np.flatnonzero(real)
            below[open_[rows]] = left[rows, column[rows]] < right[rows, column[rows]]

            open_ = open_[~found]
            width *= 2

        # One ended before it differed: a suffix that ended is smaller, whatever follows the row.
        ended = match == most
        return match, np.where(ended, (match < rest) | after, below)
