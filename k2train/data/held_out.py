"""Held-out sets: the rows that a run scores and never trains on, and how they are cut into batches.

- All rows are scored, whatever the batch. The last batch of a chunk takes only as many
  micro-batches as its rows need; what is left of these is filled with a row that does not count.
- A set is the held-out chunk of a data folder, or all chunks of a folder that has none.

Alternatives considered:
- Whole global batches only: the number then depends on the batch, and a large batch is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from k2train.data.manifest import ChunkInfo, Manifest

OWN = "held_out"
"""Name of the set that is the held-out chunk of the run's own data."""


@dataclass(frozen=True)
class HeldOutSet:
    """Rows to score: the first `limit` ones of `chunks`, in their order; None: all of them."""

    name: str
    manifest: Manifest
    chunks: tuple[ChunkInfo, ...]
    limit: int | None = None

    @classmethod
    def of(cls, name: str, manifest: Manifest, limit: int | None) -> "HeldOutSet":
        """Return the set of a data folder: its held-out chunk, or all chunks if it has none."""
        held_out = manifest.held_out
        return cls(name, manifest, (held_out,) if held_out else manifest.chunks, limit)

    @property
    def total_rows(self) -> int:
        """Rows that the set has."""
        return sum(info.rows for info in self.chunks)

    @property
    def rows(self) -> int:
        """Rows that are scored."""
        return self.total_rows if self.limit is None else min(self.limit, self.total_rows)

    def trained_on(self, trained: Mapping[str, str]) -> list[str]:
        """Say which scored chunks are trained on; `trained` has names of chunks by their hash."""
        return [
            f"{info.name} is {trained[info.sha256]}"
            for info, _ in self.scored()
            if info.sha256 in trained
        ]

    def scored(self) -> list[tuple[ChunkInfo, int]]:
        """Return the chunks that are read, and how many of their first rows are scored."""
        found, rest = [], self.rows
        for info in self.chunks:
            if rest > 0:
                found.append((info, min(info.rows, rest)))
            rest -= info.rows
        return found


class HeldOutBatch(NamedTuple):
    """Rows that are scored together: those of `rows` count."""

    chunk: ChunkInfo
    rows: range
    num_microbatches: int
    """Micro-batches of each data-parallel rank, enough for the rows."""


def held_out_batches(
    held_out: HeldOutSet, ranks: int, micro_sequences: int, most_microbatches: int
) -> Iterator[HeldOutBatch]:
    """Cut a set into batches: each of at most `most_microbatches` on each of the `ranks`."""
    wide = ranks * micro_sequences
    for info, count in held_out.scored():
        for first in range(0, count, wide * most_microbatches):
            rows = range(first, min(first + wide * most_microbatches, count))
            yield HeldOutBatch(info, rows, -(-len(rows) // wide))


def rows_of_rank(batch: HeldOutBatch, rank: int, micro_sequences: int) -> list[list[int]]:
    """Return the rows of each micro-batch of a data-parallel rank.

    A row beyond the batch's last one is that row once more, and does not count.
    """
    share = batch.num_microbatches * micro_sequences
    begin, last = batch.rows.start + rank * share, batch.rows.stop - 1
    numbers = [min(row, last) for row in range(begin, begin + share)]
    return [numbers[i : i + micro_sequences] for i in range(0, share, micro_sequences)]
