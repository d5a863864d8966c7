"""Data loading for one rank: its rows of the chunks, read ahead in a thread.

- Reading is by step number, so there is no state to save. After a restart or a rollback the trainer
  asks for another step and gets exactly its rows.
- One thread reads the next steps, another verifies the next chunk.
- A chunk that anybody touched since it was hashed is hashed again, after the read and before the
  step: what is trained on is what the manifest names.

Alternatives considered:
- DataLoader with worker processes: reading a step copies a few hundred kilobytes. Workers bring
  forks, shared memory and an order that depends on their number.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock
from typing import NamedTuple, Self

import numpy as np
import torch

from k2train.data.array_file import ArrayFile
from k2train.data.chunk import (
    ChunkIdentity,
    ChunkInfo,
    Manifest,
    bad_id,
    check_files,
    open_chunk,
    verify_chunk,
)
from k2train.data.document_boundaries import documents_of, open_borders
from k2train.data.manifest import require_borders
from k2train.data.order import ChunkOrder, rank_rows
from k2train.errors import DataError, UnavailableError

# Steps held ready: the current and the next one. More would only hold memory: a step reads in
# milliseconds.
AHEAD_STEPS = 2


class MicroBatch(NamedTuple):
    """One micro-batch, from the loader to the loss."""

    tokens: torch.Tensor
    """int64 `[micro_sequences, sequence_length]`."""
    documents: torch.Tensor | None = None
    """int32 of the same shape: document index of each token in its row; None if not requested."""
    labels: torch.Tensor | None = None
    """int64 of the same shape, aligned with the tokens: position i predicts label i+1.

    None: the tokens themselves.
    """

    @property
    def targets(self) -> torch.Tensor:
        """The labels, or the tokens where there are none."""
        return self.tokens if self.labels is None else self.labels

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to `device`; the copy may still be running on return."""
        return MicroBatch(
            *(None if part is None else part.to(device, non_blocking=True) for part in self)
        )


class _OpenChunk(NamedTuple):
    """An open chunk with its name."""

    name: str
    tokens: ArrayFile
    borders: ArrayFile | None

    def identity(self) -> ChunkIdentity:
        """Identity that the open files have now."""
        return ChunkIdentity(
            self.tokens.identity(), None if self.borders is None else self.borders.identity()
        )


class Share(NamedTuple):
    """The share of each global batch that one data-parallel rank reads."""

    rank: int
    ranks: int
    micro_sequences: int


class Loader:
    """Loader of one data-parallel rank's micro-batches.

    With `documents`, batches also contain the document index of each token. Every id is checked
    against the vocabulary. With `verify`, a chunk is also hashed once, in the background, before
    its first row is used.
    Raises DataError when the chunks do not fit the order or the model.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: ChunkOrder,
        share: Share,
        vocab_size: int,
        verify: bool = False,
        documents: bool = False,
    ) -> None:
        if manifest.vocab_size > vocab_size:
            raise DataError(
                f"model.vocab_size ({vocab_size}) must be at least that of the data "
                f"({manifest.vocab_size}, {manifest.path}): raise it"
            )

        names = [*order.names, *([manifest.held_out.name] if manifest.held_out else [])]
        check_files(manifest, names)
        if documents:
            require_borders(manifest, names)
        # Only for its check: the batch must divide into ranks and micro-batches.
        rank_rows(range(order.global_sequences), *share)

        self.manifest, self.order, self.share = manifest, order, share
        self.verify, self.documents = verify, documents
        self._progress: Callable[[], None] = lambda: None

        self._open: _OpenChunk | None = None
        self._held_out: _OpenChunk | None = None
        self._verified: dict[str, ChunkIdentity | None] = {}
        """Identity of the files that were hashed, by name of the chunk."""
        self._known: dict[str, ChunkIdentity] = {}
        """The same of those that are open, after the last look at them."""
        self._verify_lock = Lock()

        self._verified_ahead = -1
        self._stop = Event()
        # One thread each: reads stay in order, and hashing never delays a read.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="k2train-loader")
        self._verifier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="k2train-verify")
        self._pending: dict[int, Future[list[MicroBatch]]] = {}

    def step(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of `step`, in order, and start reading the next steps.

        Raises DataError, also for damage found in the background.
        """
        wanted = [
            s for s in range(step, step + 1 + AHEAD_STEPS) if s <= self.order.total_steps
        ] or [step]

        # After a rollback the prefetched steps are not the next ones any more.
        for stale in set(self._pending) - set(wanted):
            self._pending.pop(stale).cancel()
        for s in wanted[:AHEAD_STEPS]:
            self._submit(s)

        batch = self._pending.pop(step).result()

        if self.verify:
            self._verify_next(step)

        return batch

    def report_to(self, progress: Callable[[], None]) -> None:
        """Call `progress` while a step waits for a chunk to be hashed."""
        self._progress = progress

    def num_held_out_batches(self, global_sequences: int | None = None) -> int:
        """Number of full batches in the held-out chunk; 0 when the data has none."""
        held_out = self.manifest.held_out
        return held_out.rows // (global_sequences or self.order.global_sequences) if held_out else 0

    def held_out(self, batch_index: int, global_sequences: int | None = None) -> list[MicroBatch]:
        """Return this rank's micro-batches of a held-out batch, counted from 0.

        The rows never depend on the step. Raises DataError when there is no such batch.
        """
        size = global_sequences or self.order.global_sequences
        batches = self.num_held_out_batches(size)
        info = self.manifest.held_out
        if info is None or not 0 <= batch_index < batches:
            raise DataError(
                f"{self.manifest.path}: held-out batch {batch_index} of {size} rows: "
                f"there are {batches}"
            )

        # In the reader's thread, which alone opens chunks.
        return self._reader.submit(self._read_held_out, info, batch_index, size).result()

    def verify_ahead(self, name: str) -> "Future[None]":
        """Verify the named chunk in a thread; the future raises DataError when it is damaged."""
        return self._verifier.submit(self._verify, self.manifest.chunk(name), self._stop.is_set)

    def close(self) -> None:
        """Stop the threads; idempotent. A running verification ends at its next block."""
        self._stop.set()
        for pool in (self._reader, self._verifier):
            pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._open = self._held_out = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, step: int) -> None:
        if step not in self._pending:
            self._pending[step] = self._reader.submit(self._read, step)

    def _verify_next(self, step: int) -> None:
        # One chunk early: hashing gigabytes takes longer than the last step of a chunk. An error
        # found here is raised again when the chunk is opened: only good chunks are remembered.
        following = self.order.position(step).order_index + 1
        if following < len(self.order.names) and following != self._verified_ahead:
            self._verified_ahead = following
            self.verify_ahead(self.order.names[following])

    def _read(self, step: int) -> list[MicroBatch]:
        name = self.order.position(step).name
        if self._open is None or self._open.name != name:
            self._open = self._open_chunk(self.manifest.chunk(name))
        batch = self._batch(self._open, self.order.rows_of(step))
        self._confirm(self._open)
        return batch

    def _read_held_out(self, info: ChunkInfo, batch_index: int, size: int) -> list[MicroBatch]:
        if self._held_out is None:
            self._held_out = self._open_chunk(info)
        rows = range(batch_index * size, (batch_index + 1) * size)
        batch = self._batch(self._held_out, rows)
        self._confirm(self._held_out)
        return batch

    def _open_chunk(self, info: ChunkInfo) -> _OpenChunk:
        if self.verify:
            self._verify(info, self._stopped_in_a_step)

        tokens, borders = open_chunk(self.manifest, info, self._stop), None
        if self.documents:
            assert info.borders is not None, (
                f"{info.name}: its borders were required when the loader was created"
            )
            borders = open_borders(self.manifest.folder / info.borders, info.name, self._stop)

        chunk = _OpenChunk(info.name, tokens, borders)
        # What was opened is compared with it after the first read.
        self._known[info.name] = self._verified.get(info.name) or chunk.identity()
        return chunk

    def _verify(self, info: ChunkInfo, stopped: Callable[[], bool]) -> None:
        with self._verify_lock:
            if info.name not in self._verified:
                self._verified[info.name] = verify_chunk(self.manifest, info, stopped)

    def _stopped_in_a_step(self) -> bool:
        """A step waits for this hash, which gets on."""
        self._progress()
        return self._stop.is_set()

    def _confirm(self, chunk: _OpenChunk) -> None:
        """Hash a chunk again if anything touched its files since they were hashed, or opened.

        Any rank does: what one of them has read may not be what another one hashed.
        """
        now, known = chunk.identity(), self._known[chunk.name]
        if now.has_files_of(known):
            return

        info = self.manifest.chunk(chunk.name)
        hashed = verify_chunk(self.manifest, info, self._stopped_in_a_step)
        same = hashed is None or now.has_content_of(hashed)
        # A file that was replaced stays what it is while it is open.
        if not same and not now.has_content_of(known):
            raise UnavailableError(
                f"{chunk.tokens.where}: changes while it is read; stop whatever writes to it, then "
                "start the same command again"
            )
        self._known[chunk.name] = now

    def identity(self, name: str) -> ChunkIdentity | None:
        """Identity of what was opened for a chunk; None before that."""
        return self._known.get(name)

    def _batch(self, chunk: _OpenChunk, rows: range) -> list[MicroBatch]:
        return [
            MicroBatch(
                self._tokens(chunk, part),
                None if chunk.borders is None else self._documents(chunk, part),
            )
            for part in rank_rows(rows, *self.share)
        ]

    def _tokens(self, chunk: _OpenChunk, rows: range) -> torch.Tensor:
        ids = chunk.tokens[rows.start : rows.stop]
        if bad := bad_id(ids, rows.start, self.manifest.vocab_size):
            path = self.manifest.folder / self.manifest.chunk(chunk.name).file
            raise DataError(f"{chunk.name} ({path}): {bad}")

        return torch.from_numpy(np.asarray(ids, dtype=np.int64))

    def _documents(self, chunk: _OpenChunk, rows: range) -> torch.Tensor:
        assert chunk.borders is not None, f"{chunk.name} was opened without its borders"
        path = self.manifest.folder / str(self.manifest.chunk(chunk.name).borders)
        where = f"{chunk.name} ({path})"
        return torch.from_numpy(
            documents_of(chunk.borders, rows, self.manifest.sequence_length, where)
        )
