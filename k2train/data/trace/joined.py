"""Spans that go on in another row: found at the borders, and extended row by row.

- A span of eight tokens or more across a border has an 8-gram across it, and the index has the
  hashes of all of these. Each is then compared token by token, through as many rows as the document
  has.
- Of an 8-gram that is at more than MOST_BORDERS borders, as in text that repeats, only so many are
  looked at.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from k2train.data.manifest import ChunkInfo, Manifest
from k2train.data.npy import read_header
from k2train.data.trace.border_files import GRAM, Borders, gram_hashes
from k2train.data.trace.search import Ints, Place, Queries

MOST_BORDERS = 64


@dataclass(frozen=True)
class JoinedMatch:
    """Tokens `start` to `stop` of the queries, and where they are; `then` of the place goes on."""

    start: int
    stop: int
    place: Place


class BorderSearcher:
    """Searches the borders of one data folder."""

    def __init__(self, manifest: Manifest, borders: Borders) -> None:
        self.manifest, self.borders = manifest, borders
        self.length = manifest.sequence_length
        self._firsts = np.cumsum([0, *(info.rows for info in manifest.all_chunks())])

    def matches(self, queries: Queries) -> list[JoinedMatch]:
        """All matches across a border, each once, in the order of their start."""
        found: dict[tuple[int, int, Place], JoinedMatch] = {}
        seen: set[tuple[int, int]] = set()
        for border, at in self._alignments(queries):
            row = int(self.borders.links[border, 0])
            if (row, at) in seen:
                continue
            one, borders = self._extended(queries, row, at)
            seen |= borders
            if one is not None:
                found[one.start, one.stop, one.place] = one
        return sorted(found.values(), key=lambda m: (m.start, -m.stop))

    def _alignments(self, queries: Queries) -> list[tuple[int, int]]:
        """Borders whose 8-gram is in the queries, with the query's position behind the border."""
        starts = queries.begins[queries.begins + GRAM <= queries.ends[queries.begins]]
        if not len(starts) or not len(self.borders.grams):
            return []
        hashes = gram_hashes(queries.tokens[starts[:, None] + np.arange(GRAM)])
        low = np.searchsorted(self.borders.grams, hashes, side="left")
        high = np.searchsorted(self.borders.grams, hashes, side="right")

        found: dict[tuple[int, int], None] = {}
        for i in np.flatnonzero(high > low):
            for source in self.borders.sources[low[i] : min(high[i], low[i] + MOST_BORDERS)]:
                border, before = divmod(int(source), GRAM)
                found[border, int(starts[i]) + before] = None
        return list(found)

    def _extended(
        self, queries: Queries, row: int, at: int
    ) -> tuple[JoinedMatch | None, set[tuple[int, int]]]:
        """Extend a match at the end of `row`, behind which the query goes on at position `at`.

        To the left within the row: where it begins in one before, the border there is found, too.
        Returns also the borders that it crosses, as (row, position).
        """
        end = int(queries.ends[at - 1])
        begin = int(np.searchsorted(queries.ends, end, side="left"))
        wanted = queries.tokens[max(begin, at - self.length) : at]
        before = _common(self._ids(row)[self.length - len(wanted) :][::-1], wanted[::-1])
        parts = [self._place(row, self.length - before, before)]

        borders: set[tuple[int, int]] = set()
        position, current = at, row
        while position < end and (following := self.borders.next(current)) is not None:
            borders.add((current, position))
            wanted = queries.tokens[position : min(end, position + self.length)]
            same = _common(self._ids(following)[: len(wanted)], wanted)
            if same:
                parts.append(self._place(following, 0, same))
            position, current = position + same, following
            if same < self.length:
                break

        # Hashes may be equal by chance.
        if not before or position == at:
            return None, borders
        return JoinedMatch(at - before, position, _chained(parts)), borders

    def _place(self, row: int, start: int, length: int) -> Place:
        number, info = self._chunk_of(row)
        return Place(info.name, row - int(self._firsts[number]), start, length)

    def _ids(self, row: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        number, _ = self._chunk_of(row)
        ids: npt.NDArray[np.unsignedinteger[Any]] = self._chunks[number][
            row - int(self._firsts[number])
        ]
        return ids

    def _chunk_of(self, row: int) -> tuple[int, ChunkInfo]:
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return number, self.manifest.all_chunks()[number]

    @cached_property
    def _chunks(self) -> list[npt.NDArray[np.unsignedinteger[Any]]]:
        """Ids of all chunks, mapped into memory."""
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        return [
            np.memmap(
                self.manifest.folder / info.file,
                dtype,
                mode="r",
                offset=read_header(self.manifest.folder / info.file, info.name).offset,
                shape=(info.rows, self.length),
            )
            for info in self.manifest.all_chunks()
        ]


def _common(left: npt.NDArray[Any], right: Ints) -> int:
    """Number of first entries that two arrays of one length have in common."""
    differs = np.flatnonzero(left.astype(np.int64) != right)
    return int(differs[0]) if len(differs) else len(right)


def _chained(parts: list[Place]) -> Place:
    chain: Place | None = None
    for part in reversed(parts):
        chain = Place(part.chunk, part.row, part.start, part.length, chain)
    assert chain is not None, "there are parts"
    return chain
