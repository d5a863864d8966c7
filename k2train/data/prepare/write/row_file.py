"""Chunk file: a `.npy` written row by row in any order into preallocated space, hashed at the end.

- The rows of a chunk are shuffled, but the hash needs them in the order of the file. So rows are
  written at their final offset, and the file is read once more while it is synced.
- A thread writes the rows, and later waits for the disk. Meanwhile the next rows are prepared, and
  then hashed.
- Alternatives considered: shuffling in memory; a chunk may be larger than memory. Sorting rows into
  files first; that writes everything twice.
"""

import errno
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from k2train.data.npy import header_bytes
from k2train.data.prepare.workspace import process_suffix
from k2train.errors import DataError
from k2train.files import sync_directory

HASH_BYTES = 2**20


def free_bytes(folder: Path) -> int:
    """Bytes that a user may still write to the file system of a folder."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def _allocate(file: int, size_bytes: int) -> None:
    """Reserve space. Where that is not to be had, a full disk is noticed while writing."""
    try:
        os.posix_fallocate(file, 0, size_bytes)
    # macOS lacks the call; some file systems and C libraries refuse it.
    except AttributeError:
        os.ftruncate(file, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(file, size_bytes)


def check_space(folder: Path, name: str, needed_bytes: int) -> None:
    """Raises DataError when a chunk does not fit on the disk."""
    if free_bytes(folder) < needed_bytes:
        raise no_space(folder, name, needed_bytes)


def no_space(folder: Path, name: str, needed_bytes: int) -> DataError:
    """The DataError of a full disk, to be raised by the caller."""
    return DataError(
        f"output: {name} needs {needed_bytes:,} bytes in {folder}, {free_bytes(folder):,} "
        "are free: make room there, or name an output on another disk"
    )


class ChunkFile:
    """Context manager that writes the chunk `path` of `rows` rows.

    The file gets its name at `finish`; without it, it is removed.
    """

    def __init__(self, path: Path, rows: int, length: int, dtype: str) -> None:
        self.path, self.rows = path, rows
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.temporary = path.with_name(f"{path.name}{process_suffix()}.tmp")
        self.header = header_bytes((rows, length), self.dtype)
        self.row_bytes = length * self.dtype.itemsize

    def __enter__(self) -> "ChunkFile":
        size_bytes = len(self.header) + self.rows * self.row_bytes
        self._file = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._thread = ThreadPoolExecutor(1, "chunk")
        self._writing: Future[None] | None = None

        try:
            _allocate(self._file, size_bytes)
            self._write(self.header, 0)
        except BaseException:
            self._close()
            raise

        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._thread.shutdown()
        os.close(self._file)
        self.temporary.unlink(missing_ok=True)

    def _write(self, content: "memoryview | bytes", offset: int) -> None:
        while content:
            # A write may be shorter than asked for.
            written = os.pwrite(self._file, content, offset)
            content, offset = content[written:], offset + written

    def write(
        self, rows: "npt.NDArray[np.unsignedinteger[Any]]", row_numbers: npt.NDArray[np.uint32]
    ) -> None:
        """Write rows `[n, length]` of the chunk's dtype to the row numbers `[n]`.

        Returns before they are written, but after those of the previous call are, so two
        alternating arrays suffice. Raises the OSError of an earlier call too.
        """
        self._wait_for_writes()
        if len(rows):
            self._writing = self._thread.submit(self._scatter, rows, row_numbers)

    def _wait_for_writes(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _scatter(
        self, rows: "npt.NDArray[np.unsignedinteger[Any]]", row_numbers: npt.NDArray[np.uint32]
    ) -> None:
        """Write rows to their positions, adjacent rows in one write when that is common."""
        order = np.argsort(row_numbers)
        row_numbers = row_numbers[order]

        offsets = row_numbers.astype(np.int64) * self.row_bytes + len(self.header)
        # Index of the first row of each group of adjacent rows.
        firsts = np.concatenate(
            [np.zeros(1, np.int64), np.flatnonzero(np.diff(row_numbers) != 1) + 1]
        )
        if 2 * len(firsts) > len(row_numbers):
            content = rows.data.cast("B")
            starts = (order * self.row_bytes).tolist()
            for start, offset in zip(starts, offsets.tolist(), strict=True):
                self._write(content[start : start + self.row_bytes], offset)
            return

        # Short rows of a small chunk: adjacent rows are one write.
        content = rows[order].data.cast("B")
        starts = [*(firsts * self.row_bytes).tolist(), len(content)]
        for start, end, offset in zip(starts, starts[1:], offsets[firsts].tolist(), strict=False):
            self._write(content[start:end], offset)

    def finish(self) -> str:
        """Sync the file and give it its final name; returns its sha256."""
        self._wait_for_writes()
        # The disk syncs while the file is hashed.
        synced = self._thread.submit(os.fsync, self._file)
        digest = hashlib.sha256()
        block = memoryview(bytearray(HASH_BYTES))
        offset = 0
        while count := os.preadv(self._file, [block], offset):
            digest.update(block[:count])
            offset += count

        synced.result()
        os.replace(self.temporary, self.path)
        sync_directory(self.path.parent)

        return digest.hexdigest()
