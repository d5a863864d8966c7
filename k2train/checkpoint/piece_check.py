"""Reading blocks of a shard file while checking the hashes of their pieces, in one pass. No torch.

- A piece is hashed where it lies after the read, while the core's cache still holds it. A load thus
  checks the memory that it fills, and not only what the disk delivered.

Alternatives considered:
- Hashing the file first and reading it again: twice the time, and the second read is unchecked.
"""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

import xxhash

from k2train.checkpoint.manifest_types import PieceFacts
from k2train.checkpoint.shards import Extent
from k2train.retry import retried

READ_BYTES = 1 << 22
"""Bytes read at a stretch, and then hashed: still in a cache."""
PROGRESS_BYTES = 1 << 26
"""A slow disk reads as much within any timeout."""
DAMAGED = "does not match its hash in the manifest; it was changed or damaged"


class Damage(Exception):
    """Bytes are not those that were saved; the text follows the file's name in a message."""


class ShardReader:
    """Reads of one open shard file, each tried again on an error that may pass.

    Several threads may read at once, but not close. They share one open file, so that the system
    sees pieces in their order and reads ahead.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor = -1
        self._opened: list[int] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file."""
        for descriptor in self._opened:
            os.close(descriptor)
        self._opened, self._descriptor = [], -1

    def read(self, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes from `start` on.

        Raises OSError, UnavailableError, and EOFError when the file ends earlier.
        """
        while view:
            count = retried(partial(self._read_once, view, start), self.file)
            if count == 0:
                raise EOFError(f"the file ends at byte {start}")
            view, start = view[count:], start + count

    def _read_once(self, view: memoryview, start: int) -> int:
        descriptor = self._open()
        try:
            return os.preadv(descriptor, [view], start)
        except OSError:
            # A stale handle stays stale: the next try opens the file anew. Other threads may still
            # read from this one, so its number must not become another file's.
            with self._lock:
                if self._descriptor == descriptor:
                    self._descriptor = -1
            raise

    def _open(self) -> int:
        with self._lock:
            if self._descriptor < 0:
                # O_NONBLOCK: a pipe in place of the file must not block the reader.
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                self._descriptor = os.open(self.file, flags)
                self._opened.append(self._descriptor)
            return self._descriptor

    def read_piece(self, view: memoryview, start: int, wanted: str, name: str) -> None:
        """Fill `view` with a piece of tensor `name` and check its XXH3-128.

        One that differs is read once more: what went wrong on the way to this memory is no damage
        of the file. Raises Damage, and what `read` raises.
        """
        for _ in range(2):
            found = xxhash.xxh3_128()
            for at in range(0, view.nbytes, READ_BYTES):
                part = view[at : at + READ_BYTES]
                self.read(part, start + at)
                found.update(part)
            if found.hexdigest() == wanted:
                return
            # What memory holds of the file may be what is wrong: read it from the disk.
            with suppress(OSError):
                os.posix_fadvise(self._open(), start, view.nbytes, os.POSIX_FADV_DONTNEED)
        raise Damage(f": tensor {name} {DAMAGED}")


def pieces_of(
    pieces: PieceFacts, extent: Extent, low: int, high: int
) -> Sequence[tuple[int, int, str]]:
    """(first byte, end, XXH3-128) of each piece of a block that overlaps `low` to `high`, in bytes
    of the file.

    Raises Damage when the side file has another number of hashes.
    """
    block, step = pieces.tensors.get(extent.name), pieces.piece_bytes
    hashes = None if block is None else block.get("xxh3_128")
    starts = range(extent.start, extent.stop, step)
    if not isinstance(hashes, list) or len(starts) != len(hashes):
        raise Damage(f": tensor {extent.name} has no hash for each of {len(starts)} pieces")
    first, stop = (low - extent.start) // step, -(-(high - extent.start) // step)
    return [
        (starts[n], min(starts[n] + step, extent.stop), hashes[n])
        for n in range(max(first, 0), min(stop, len(starts)))
    ]


def check_blocks(
    file: Path,
    extents: Sequence[Extent],
    pieces: PieceFacts,
    file_sha256: str | None,
    progress: Callable[[], None],
) -> None:
    """Read blocks and check every piece; with `file_sha256` they are all of the file's.

    `progress` is called about once a `PROGRESS_BYTES`. Raises Damage, OSError, EOFError,
    UnavailableError.
    """
    whole = sha256()
    buffer = memoryview(bytearray(min(pieces.piece_bytes, max(_longest(extents), 1))))
    with closing(ShardReader(file)) as reader:
        if file_sha256 is not None:
            header = memoryview(bytearray(extents[0].start if extents else 0))
            reader.read(header, 0)
            whole.update(header)

        unreported = 0
        for extent in extents:
            for start, stop, wanted in pieces_of(pieces, extent, extent.start, extent.stop):
                view = buffer[: stop - start]
                reader.read_piece(view, start, wanted, extent.name)
                if file_sha256 is not None:
                    whole.update(view)
                unreported += stop - start
                if unreported >= PROGRESS_BYTES:
                    unreported = 0
                    progress()

    progress()
    if file_sha256 is not None and whole.hexdigest() != file_sha256:
        raise Damage(f" {DAMAGED}")


def _longest(extents: Sequence[Extent]) -> int:
    return max((extent.stop - extent.start for extent in extents), default=0)
