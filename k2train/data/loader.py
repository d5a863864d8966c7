"""Data loading for one rank: its rows of the chunks, read ahead in a thread.

- Reading is by step number, so there is no state to save. After a restart or a rollback the trainer
  asks for another step and gets exactly its rows.
- One thread reads the next steps, another verifies the next chunk.
- `chunk_reader` opens and hashes the files, also those of held-out sets.
- Where a folder has loss masks, labels are the tokens that are learned. Every read makes them anew,
  so no step sees what another one did to them.

Alternatives considered:
- DataLoader with worker processes: reading a step copies a few hundred kilobytes. Workers bring
  forks, shared memory and an order that depends on their number.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Self

import torch

from k2train.data.chunk import ChunkIdentity, Manifest, check_files
from k2train.data.chunk_reader import ChunkReader, OpenChunk
from k2train.data.held_out import HeldOutSet, held_out_batches, rows_of_rank
from k2train.data.manifest import require_borders
from k2train.data.order import ChunkOrder, rank_rows
from k2train.errors import DataError
from k2train.parallel.cross_entropy import IGNORE

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
    row_targets: tuple[int, ...] | None = None
    """Labels that are learned in each row of the whole global batch, which the loss is divided by.

    None: every position but the last of a row has one.
    """
    host_documents: torch.Tensor | None = None
    """`documents` in host memory, which `to` keeps: no kernel asks a device where a document ends.

    None: `documents` are there themselves, or there are none.
    """

    @property
    def targets(self) -> torch.Tensor:
        """The labels, or the tokens where there are none."""
        return self.tokens if self.labels is None else self.labels

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to `device`; the copy may still be running on return.

        To a CUDA device from pinned memory: from other memory the copy would block the host. torch
        keeps that memory until the copy is over.
        """

        def uploaded(part: torch.Tensor) -> torch.Tensor:
            # A part that was expanded has no memory of its own to pin.
            part = part.contiguous().pin_memory() if device.type == "cuda" else part
            return part.to(device, non_blocking=True)

        here = self.documents if self.host_documents is None else self.host_documents
        return self.map(uploaded)._replace(host_documents=here)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        """Apply `change` to each of its tensors, but for the copy that `to` keeps on the host."""
        return self._replace(
            tokens=change(self.tokens),
            documents=None if self.documents is None else change(self.documents),
            labels=None if self.labels is None else change(self.labels),
        )


class Share(NamedTuple):
    """The share of each global batch that one data-parallel rank reads."""

    rank: int
    ranks: int
    micro_sequences: int


class Loader:
    """Loader of one data-parallel rank's micro-batches.

    With `documents`, batches also contain the document index of each token. Where the manifest has
    loss masks, they contain labels, and how many of them the global batch has. Every id is checked
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

        check_files(manifest, order.names)
        if documents:
            require_borders(manifest, order.names)
        # Only for its check: the batch must divide into ranks and micro-batches.
        rank_rows(range(order.global_sequences), *share)

        self.manifest, self.order, self.share = manifest, order, share
        self.verify = verify
        self._reads = ChunkReader(manifest, verify, documents)
        self._open: OpenChunk | None = None
        self._verified_ahead = -1
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
        self._reads.progress = progress

    def verify_ahead(self, name: str) -> "Future[None]":
        """Verify the named chunk in a thread; the future raises DataError when it is damaged."""
        return self._verifier.submit(self._reads.verify, self.manifest.chunk(name))

    def close(self) -> None:
        """Stop the threads; idempotent. A running verification ends at its next block."""
        self._reads.stop.set()
        for pool in (self._reader, self._verifier):
            pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._open = None

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
            self._open = self._reads.open(self.manifest.chunk(name))
        rows = self.order.rows_of(step)
        # Each rank counts the targets of all ranks' rows itself: their masks are kilobytes.
        targets = self._reads.targets_in(self._open, rows)
        batch = [
            _micro_batch(self._reads, self._open, part, targets)
            for part in rank_rows(rows, *self.share)
        ]
        self._reads.confirm(self._open)
        return batch

    def identity(self, name: str) -> ChunkIdentity | None:
        """Identity of what was opened for a chunk; None before that."""
        return self._reads.identity(name)


class HeldOutLoader:
    """Loader of one data-parallel rank's micro-batches of a held-out set.

    `most_microbatches` are those of a step. `verify` and `documents` as for `Loader`. The rows
    never depend on the step. Raises DataError when files are missing or lack document boundaries.
    """

    def __init__(
        self,
        held_out: HeldOutSet,
        share: Share,
        most_microbatches: int,
        verify: bool = False,
        documents: bool = False,
    ) -> None:
        names = [info.name for info, _ in held_out.scored()]
        check_files(held_out.manifest, names)
        if documents:
            require_borders(held_out.manifest, names)

        self.set, self.share = held_out, share
        self.batches = list(
            held_out_batches(held_out, share.ranks, share.micro_sequences, most_microbatches)
        )
        """The batches of all ranks, in the order of the rows."""
        self._reads = ChunkReader(held_out.manifest, verify, documents)
        self._open: OpenChunk | None = None

    def report_to(self, progress: Callable[[], None]) -> None:
        """Call `progress` while a chunk is hashed."""
        self._reads.progress = progress

    def opens(self, index: int) -> str:
        """Name of the chunk that this batch opens; "" if the one before it did."""
        name = self.batches[index].chunk.name
        return "" if index and self.batches[index - 1].chunk.name == name else name

    def read(self, index: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a batch, padding included. Raises DataError.

        Their `row_targets` are those of the batch's rows, without the padding.
        """
        batch = self.batches[index]
        if self._open is None or self._open.name != batch.chunk.name:
            self._open = self._reads.open(batch.chunk)
        targets = self._reads.targets_in(self._open, batch.rows)
        found = []
        for rows in rows_of_rank(batch, self.share.rank, self.share.micro_sequences):
            part = _micro_batch(self._reads, self._open, range(rows[0], rows[-1] + 1), targets)
            index_of = torch.tensor(rows) - rows[0]
            found.append(part.map(partial(_rows_of, index_of=index_of)))
        self._reads.confirm(self._open)
        return found

    def identity(self, name: str) -> ChunkIdentity | None:
        """Identity of what was opened for a chunk; None before that."""
        return self._reads.identity(name)

    def close(self) -> None:
        """Close the chunk, and end whatever waits for it; idempotent."""
        self._reads.stop.set()
        self._open = None


def _micro_batch(
    reads: ChunkReader, chunk: OpenChunk, rows: range, row_targets: tuple[int, ...] | None
) -> MicroBatch:
    """Read consecutive rows of an open chunk; `row_targets` are those of the batch's rows."""
    tokens = torch.from_numpy(reads.tokens(chunk, rows))
    documents, learned = reads.documents_in(chunk, rows), reads.learned_in(chunk, rows)
    return MicroBatch(
        tokens,
        None if documents is None else torch.from_numpy(documents),
        None if learned is None else tokens.where(torch.from_numpy(learned), IGNORE),
        row_targets,
    )


def _rows_of(part: torch.Tensor, index_of: torch.Tensor) -> torch.Tensor:
    return part[index_of]
