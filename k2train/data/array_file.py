"""Arrays in `.npy` files, read by plain reads: one that changes or fails is told, never a signal.

- A mapped file that somebody shortens, or whose server fails, ends the process with SIGBUS, without
  one word. A read says which file and which row.
- Reads are tried again after an error that may pass (`k2train.retry`).
- The identity of the open file says whether anybody touched it since it was hashed.

Alternatives considered:
- A handler for SIGBUS: it cannot name the row, and Python cannot run it in time.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from k2train.errors import DataError, UnavailableError
from k2train.retry import retried

T = TypeVar("T")


class FileIdentity(NamedTuple):
    """What a file is to the system: another content shows here, without reading it.

    Without the device: a file system that is mounted again has another number.
    """

    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    """Also moves for a new owner or name, while the content stays."""

    @classmethod
    def of(cls, facts: os.stat_result) -> "FileIdentity":
        """Identity of a file with these facts."""
        return cls(facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)

    def has_content_of(self, other: "FileIdentity") -> bool:
        """Return whether it is the same file, and nobody wrote to it in between."""
        return self.content == other.content

    @property
    def content(self) -> tuple[int, int, int]:
        """What changes with the content."""
        return self[:3]


class ArrayFile:
    """Array `[rows, ...]` in the file at `path`, whose data begin at byte `offset`.

    Indexed by a row number or a range of rows. Errors begin with `where`. `stop` ends the patience
    with a file system that does not answer.
    Raises DataError when the file is shorter than its rows or cannot be opened; UnavailableError
    when it cannot be read for now, or is another one after that.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        where: str,
        stop: Event | None = None,
    ) -> None:
        self.path, self.where, self.shape, self._stop = path, where, shape, stop
        self._offset, self._dtype = offset, dtype
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        self._descriptor = -1
        self._identity: FileIdentity | None = None
        """Identity of the file as it was opened first."""
        self._identity = self.identity()

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
            count = self._retried(lambda fd: os.preadv(fd, [rest], at))  # noqa: B023
            if count == 0:
                row = (at - self._offset) // self._row_bytes
                raise DataError(
                    f"{self.where}: ends in row {row} of {len(self)}; it was shortened after it "
                    "was opened; fetch it again"
                )
            rest, at = rest[count:], at + count
        return found

    def identity(self) -> FileIdentity:
        """Return the identity that the open file has now."""
        return self._retried(lambda fd: FileIdentity.of(os.fstat(fd)))

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _retried(self, call: Callable[[int], T]) -> T:
        def once() -> T:
            try:
                self._open()
                return call(self._descriptor)
            except OSError:
                # A stale handle stays stale.
                self.close()
                raise

        try:
            return retried(once, self.where, self._stop)
        except OSError as error:
            raise DataError(
                f"{self.where}: cannot be read ({error.strerror}); fetch it again"
            ) from None

    def _open(self) -> None:
        """Open the file, the first time or after an error."""
        if self._descriptor >= 0:
            return
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        now, first = FileIdentity.of(os.fstat(self._descriptor)), self._identity
        if first is not None and not now.has_content_of(first):
            raise UnavailableError(
                f"{self.where}: another file has this name since it could not be read; start the "
                "same command again, which hashes it",
                errno.ESTALE,
            )
