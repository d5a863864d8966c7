"""Reading rows of chunk files that were verified: opened, hashed once, hashed again when touched.

- One object for each data folder and purpose: the chunks trained on, a held-out set.
- A chunk that anybody touched since it was hashed is hashed again, after the read and before the
  rows are used: what a model sees is what the manifest names.

Alternatives considered:
- Hashing at every opening alone: a file that is exchanged or rewritten later would be read.
"""

from collections.abc import Callable
from threading import Event, Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from k2train.data.array_file import ArrayFile
from k2train.data.chunk import ChunkIdentity, ChunkInfo, Manifest, bad_id, open_chunk, verify_chunk
from k2train.data.document_boundaries import documents_of, open_borders
from k2train.data.loss_mask import Learned, count_targets, learned_in, open_mask, read_mask
from k2train.errors import DataError, UnavailableError


class OpenChunk(NamedTuple):
    """An open chunk with its name."""

    name: str
    tokens: ArrayFile
    borders: ArrayFile | None
    mask: ArrayFile | None

    def identity(self) -> ChunkIdentity:
        """Identity that the open files have now."""
        beside = (None if part is None else part.identity() for part in (self.borders, self.mask))
        return ChunkIdentity(self.tokens.identity(), *beside)


class ChunkReader:
    """Rows of the chunks of one data folder.

    With `documents`, document boundaries are opened too; loss masks where the manifest has them.
    With `verify`, a chunk is hashed once before its first row is used.
    """

    def __init__(self, manifest: Manifest, verify: bool = False, documents: bool = False) -> None:
        self.manifest, self.verifies, self.documents = manifest, verify, documents
        self.stop = Event()
        """Set when the reader is closed: whatever waits or hashes ends soon."""
        self.progress: Callable[[], None] = lambda: None
        """Called while a step waits for a chunk to be hashed."""
        self._verified: dict[str, ChunkIdentity | None] = {}
        """Identity of the files that were hashed, by name of the chunk."""
        self._known: dict[str, ChunkIdentity] = {}
        """The same of those that are open, after the last look at them."""
        self._verify_lock = Lock()

    def open(self, info: ChunkInfo) -> OpenChunk:
        """Open a chunk. Raises DataError when it is damaged."""
        if self.verifies:
            self.verify(info, self._stopped_in_a_step)

        tokens, borders = open_chunk(self.manifest, info, self.stop), None
        if self.documents:
            assert info.borders is not None, (
                f"{info.name}: its borders were required when the reader was created"
            )
            borders = open_borders(self.manifest.folder / info.borders, info.name, self.stop)

        masked = self.manifest.has_masks
        mask = open_mask(self.manifest, info, self.stop) if masked else None
        chunk = OpenChunk(info.name, tokens, borders, mask)
        # What was opened is compared with it after the first read.
        self._known[info.name] = self._verified.get(info.name) or chunk.identity()
        return chunk

    def verify(self, info: ChunkInfo, stopped: Callable[[], bool] | None = None) -> None:
        """Hash a chunk unless that was done. Raises DataError when it is damaged."""
        with self._verify_lock:
            if info.name not in self._verified:
                self._verified[info.name] = verify_chunk(
                    self.manifest, info, stopped or self.stop.is_set
                )

    def confirm(self, chunk: OpenChunk) -> None:
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

    def tokens(self, chunk: OpenChunk, rows: range) -> npt.NDArray[np.int64]:
        """Ids [rows, sequence_length]. Raises DataError for one outside the vocabulary."""
        ids = chunk.tokens[rows.start : rows.stop]
        if bad := bad_id(ids, rows.start, self.manifest.vocab_size):
            path = self.manifest.folder / self.manifest.chunk(chunk.name).file
            raise DataError(f"{chunk.name} ({path}): {bad}")

        return np.asarray(ids, dtype=np.int64)

    def documents_in(self, chunk: OpenChunk, rows: range) -> npt.NDArray[Any] | None:
        """Document index [rows, sequence_length] of each token; None if not opened."""
        if chunk.borders is None:
            return None
        path = self.manifest.folder / str(self.manifest.chunk(chunk.name).borders)
        where = f"{chunk.name} ({path})"
        return documents_of(chunk.borders, rows, self.manifest.sequence_length, where)

    def learned_in(self, chunk: OpenChunk, rows: range) -> Learned | None:
        """Which tokens are learned, bool [rows, sequence_length]; None if masks are not opened.

        A new array each time: nobody else sees what is done to it.
        """
        if chunk.mask is None:
            return None
        length = self.manifest.sequence_length
        return learned_in(read_mask(chunk.mask, rows, length), length)

    def targets_in(self, chunk: OpenChunk, rows: range) -> tuple[int, ...] | None:
        """Number of learned tokens of each row; None if masks are not opened."""
        if chunk.mask is None:
            return None
        packed = read_mask(chunk.mask, rows, self.manifest.sequence_length)
        return tuple(count_targets(packed).tolist())

    def _stopped_in_a_step(self) -> bool:
        """A step waits for this hash, which gets on."""
        self.progress()
        return self.stop.is_set()
