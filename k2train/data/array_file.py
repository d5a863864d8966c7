"""Arrays in `.npy` files, read by plain reads: one that changes or fails is told, never a signal.

- A mapped file that somebody shortens, or whose server fails, ends the process with SIGBUS, without
  one word. A read says which file and which row.
- Reads are tried again after an error that may pass (`k2train.retry`).
- The identity of the open file is compared after every read: what is trained on is what was hashed.

Alternatives considered:
- A handler for SIGBUS: it cannot name the row, and Python cannot run it in time.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from k2train.errors import DataError
from k2train.retry import retried


class FileIdentity(NamedTuple):
    """What a file is to the system: another content shows here, without reading it."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    """Also moves for a new owner or name, while the content stays."""

    @classmethod
    def of(cls, facts: os.stat_result) -> "FileIdentity":
        """Identity of a file with these facts."""
        return cls(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)

    def has_content_of(self, other: "FileIdentity") -> bool:
        """Return whether it is the same file, and nobody wrote to it in between."""
        return self[:4] == other[:4]


class ArrayFile:
    """Array `[rows, ...]` in the file at `path`, whose data begin at byte `offset`.

    Indexed by a row number or a range of rows. Errors begin with `where`. Raises DataError when the
    file is shorter than its rows, or another one than when it was opened; UnavailableError when it
    cannot be read for now.
    """

    def __init__(
        self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], where: str
    ) -> None:
        self.path, self.where = path, where
        self.shape = shape
        self._offset, self._dtype = offset, dtype
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        self._descriptor = -1
        self.identity = retried(self._open, where)
        """Identity of the file as it was opened."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> npt.NDArray[Any]:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            assert step == 1, "rows are read in order"
            return self.read(start, max(start, stop))
        row: npt.NDArray[Any] = self.read(int(rows), int(rows) + 1)[0]
        return row

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Read rows `start` to `stop`."""
        assert 0 <= start <= stop <= len(self), f"rows {start} to {stop} of {len(self)}"
        found = np.empty((stop - start, *self.shape[1:]), dtype=self._dtype)
        if not found.size:
            return found
        rest, at = found.data.cast("B"), self._offset + start * self._row_bytes
        while rest:
            count = retried(lambda: self._read(rest, at), self.where)  # noqa: B023
            if count == 0:
                row = (at - self._offset) // self._row_bytes
                raise DataError(
                    f"{self.where}: ends in row {row} of {len(self)}; it was shortened after it "
                    "was opened; fetch it again"
                )
            rest, at = rest[count:], at + count
        self._require_content_of(self.current_identity())
        return found

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _open(self) -> FileIdentity:
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return FileIdentity.of(os.fstat(self._descriptor))

    def _read(self, buffer: memoryview, at: int) -> int:
        if self._descriptor < 0:
            # A stale handle stays stale. The name may belong to another file by now.
            self._require_content_of(self._open())
        try:
            return os.preadv(self._descriptor, [buffer], at)
        except OSError:
            self.close()
            raise

    def current_identity(self) -> FileIdentity:
        """Return the identity that the open file has now."""
        return retried(lambda: FileIdentity.of(os.fstat(self._descriptor)), self.where)

    def _require_content_of(self, now: FileIdentity) -> None:
        if not now.has_content_of(self.identity):
            raise DataError(
                f"{self.where}: is not what it was when it was opened (size {now.size}, was "
                f"{self.identity.size}; written to, or another file); stop whatever changes it, "
                "and fetch it again"
            )
