"""Data order: the chunk and rows that each step reads, a pure function of chunk order and batch.

- The position in the data is the step of the stage; chunk and rows follow by arithmetic.
- Chunk borders are enforced: a step never mixes two chunks, and rows beyond a chunk's last full
  step are dropped.
- The order is that of the config, and then of the deferrals in the ledger: `apply_events`, for the
  run as for its inspection.

Alternatives considered:
- A stored cursor in the loader: it depends on ranks, workers and restarts, and is what other
  frameworks lose on resume.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from k2train.errors import DataError, RunError
from k2train.record.events import Entry, deferrals_of

if TYPE_CHECKING:
    from k2train.data.chunk import Manifest


@dataclass(frozen=True)
class Position:
    """Position of a step in the data.

    `step` counts from 1 over the stage, `step_in_chunk` from 0 within its chunk.
    """

    step: int
    order_index: int
    name: str
    step_in_chunk: int


@dataclass(frozen=True)
class ChunkOrder:
    """Chunks in reading order with their rows, and the sequences per step over all ranks."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    global_sequences: int

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Last step of each chunk, cumulative."""
        ends, total = [], 0
        for i in range(len(self.names)):
            total += self.steps_in(i)
            ends.append(total)

        return tuple(ends)

    @property
    def total_steps(self) -> int:
        """Number of full steps in all chunks."""
        return self._ends[-1]

    def steps_in(self, i: int) -> int:
        """Number of full steps in the i-th chunk of the order."""
        return self.rows[i] // self.global_sequences

    def first_step(self, i: int) -> int:
        """First step, counted from 1, that reads the i-th chunk of the order."""
        return self._ends[i] - self.steps_in(i) + 1

    def dropped_rows(self, i: int) -> int:
        """Number of rows of the i-th chunk beyond its last full step."""
        return self.rows[i] % self.global_sequences

    def position(self, step: int) -> Position:
        """Locate a step: chunk and step within it.

        Raises DataError for a step outside 1 ... total_steps.
        """
        if not 1 <= step <= self.total_steps:
            raise DataError(
                f"step {step} is outside the data: {len(self.names)} chunks hold steps 1 to "
                f"{self.total_steps}"
            )

        # The chunk whose last step is the first one not below `step`.
        index = bisect_right(self._ends, step - 1)
        return Position(step, index, self.names[index], step - self.first_step(index))

    def rows_of(self, step: int) -> range:
        """Rows of its chunk that the step reads, over all data-parallel ranks."""
        first = self.position(step).step_in_chunk * self.global_sequences
        return range(first, first + self.global_sequences)

    def consumed_chunks(self, step: int) -> int:
        """Number of chunks read to their last full step after `step`; 0 for step 0."""
        return bisect_right(self._ends, step)

    def is_chunk_end(self, step: int) -> bool:
        """True when `step` is the last one of its chunk, where a numbered checkpoint is saved."""
        return self._ends[self.position(step).order_index] == step

    def sample_ids(self, step: int) -> list[str]:
        """Names of the step's samples in order, `chunk_003:17`, the same on any grid of ranks."""
        return sample_ids(self.position(step).name, self.rows_of(step))

    def deferred(self, i: int, to: int) -> "ChunkOrder":
        """Return the order with its i-th chunk moved to the later position `to`.

        Steps before that chunk keep their rows.
        """
        kept = [k for k in range(len(self.names)) if k != i]
        kept.insert(to, i)
        return ChunkOrder(
            tuple(self.names[k] for k in kept),
            tuple(self.rows[k] for k in kept),
            self.global_sequences,
        )


def sample_ids(name: str, rows: range) -> list[str]:
    """Sample names `chunk_003:17` of rows of a chunk."""
    return [f"{name}:{row}" for row in rows]


def make_order(
    manifest: "Manifest",
    order: Sequence[str | int] | None,
    global_sequences: int,
    sequence_length: int | None = None,
) -> ChunkOrder:
    """Build the order of a run from `data.order`: names or chunk numbers, or None for all chunks.

    None means ascending numbers. Chunks left out of an explicit order are not read.
    `sequence_length` is `data.sequence_length`, compared with that of the chunks if given.
    Raises DataError with the numbers.
    """
    if global_sequences < 1:
        raise DataError(f"batch.global_sequences ({global_sequences}) must be at least 1")

    if sequence_length is not None and sequence_length != manifest.sequence_length:
        raise DataError(
            f"data.sequence_length ({sequence_length}) must be that of the chunks in "
            f"{manifest.path} ({manifest.sequence_length}): set it so, or prepare the data with "
            "another length"
        )

    rows = {info.name: info.rows for info in manifest.chunks}
    names = (
        sorted(rows, key=_ascending)
        if order is None
        else [_resolve(item, rows, manifest) for item in order]
    )

    if not names:
        raise DataError(
            "data.order is empty: list at least one chunk, or leave the key out to read all"
        )

    if repeated := sorted({name for name in names if names.count(name) > 1}, key=_ascending):
        raise DataError(
            f"data.order names {', '.join(repeated)} more than once: each chunk is read once per "
            "stage"
        )

    for name in names:
        if rows[name] < global_sequences:
            raise DataError(
                f"{name} has {rows[name]} rows, fewer than one step of batch.global_sequences "
                f"({global_sequences}): lower it to {rows[name]} or less, or prepare larger chunks"
            )

    return ChunkOrder(tuple(names), tuple(rows[name] for name in names), global_sequences)


def apply_events(order: ChunkOrder, entries: Iterable[Entry], where: str) -> ChunkOrder:
    """Return the order after every deferral in the ledger `where`.

    With the order of the config and all entries, it is the order that the run follows. A deferral
    names its new position, so chunks that a later config appends do not move it.
    Raises RunError for a deferral that does not fit the order.
    """
    for entry in entries:
        for event in deferrals_of(entry.event):
            line = f"{where}: line {entry.seq + 1} defers {event.chunk!r}"
            if event.chunk not in order.names:
                raise RunError(f"{line}, which the order does not have")

            i, last = order.names.index(event.chunk), len(order.names) - 1
            to = event.order_index
            if not i <= to <= last or order.first_step(i) <= event.step:
                raise RunError(
                    f"{line} to position {to} after step {event.step}; it begins with step "
                    f"{order.first_step(i)} at position {i} of 0 to {last}: a chunk that has "
                    "begun stays, another goes to a later position"
                )
            order = order.deferred(i, to)
    return order


def _ascending(name: str) -> tuple[int, str]:
    # By number: chunk_1000 comes after chunk_999, but sorts before it as text.
    digits = re.search(r"(\d+)$", name)
    return (int(digits.group(1)) if digits else -1, name)


def _resolve(item: str | int, rows: dict[str, int], manifest: "Manifest") -> str:
    name = f"chunk_{item:03d}" if isinstance(item, int) else item
    if name not in rows:
        known = sorted(rows, key=_ascending)
        raise DataError(
            f"data.order names {name}, which {manifest.path} does not have: "
            f"it has {len(known)} chunks, {known[0]} to {known[-1]}"
        )
    return name


def rank_rows(rows: range, dp: int, data: int, micro_sequences: int) -> list[range]:
    """Micro-batches of data-parallel rank `dp` of `data`, as ranges of rows.

    Each rank takes a contiguous slice of the step's rows, and cuts it in order.
    Raises DataError when the step's rows do not divide into data x micro_sequences.
    """
    assert 0 <= dp < data, f"data-parallel rank {dp} of {data}"

    if len(rows) % (data * micro_sequences):
        step = data * micro_sequences
        nearest = [n for n in (len(rows) // step * step, (len(rows) // step + 1) * step) if n]
        raise DataError(
            f"batch.global_sequences ({len(rows)}) must be divisible by data-parallel ranks x "
            f"batch.micro_sequences ({data} x {micro_sequences} = {step}); nearest that are: "
            f"{', '.join(map(str, nearest))}"
        )

    # Contiguous slices, so that a rank reads one range of the file.
    share = len(rows) // data
    mine = rows[dp * share : (dp + 1) * share]
    return [mine[i : i + micro_sequences] for i in range(0, share, micro_sequences)]
