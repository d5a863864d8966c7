"""Retry of reads: an error of the file system that may pass is told, waited for, then given up.

- Network file systems answer EIO, ESTALE or ETIMEDOUT while a server restarts. The same read
  succeeds a minute later, so such an error is nobody's mistake, and no proof of damage.
- A read that still fails after `PATIENCE_SECONDS` ends with UnavailableError: exit code 1, after
  which launchers start the same command again. A mistake (2) they leave to a person.
- It is logged as a warning, which Python writes to stderr; `tell_only` where many processes of a
  machine see the same. What a file system lacks is told once (`tell_once`).
- The watchdog asks `is_waiting`: a rank that waits here gets on, and is not stuck.

Alternatives considered:
- Leaving it to the next start: a whole cluster starts again for an answer that was a second late.
- Retrying every error: a file that does not exist is told at once.
"""

import errno
import io
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from k2train.errors import UnavailableError
from k2train.text import duration

T = TypeVar("T")

PATIENCE_SECONDS = 120.0
"""Time for which a read is tried again: a file server fails over within a minute or two."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0

PASSING = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK, errno.EAGAIN, errno.EBUSY),
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
        *(errno.EREMOTEIO, errno.ESHUTDOWN, errno.EPROTO, errno.ENOMEM, errno.ENOBUFS),
        *(errno.ENOSPC, errno.EDQUOT),
    }
)
"""Error numbers of the environment: the same call may succeed later."""
MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
"""Error numbers that say that there is no such file."""

_log = logging.getLogger(__name__)
_waiting: list[int] = []
"""Threads that wait, by number."""
_told: set[str] = set()
"""What was told once."""


def is_passing(error: OSError) -> bool:
    """Return whether the same call may succeed later."""
    return error.errno in PASSING


def is_waiting() -> bool:
    """Return whether a thread of this process waits to try a read again."""
    return bool(_waiting)


def tell_only(first: bool) -> None:
    """Let only the first process of a machine log its waits: they share a file system."""
    _log.setLevel(logging.WARNING if first else logging.ERROR)


def tell_once(kind: str, text: str) -> None:
    """Log `text`, the first of its `kind` in this process: what the environment lacks."""
    if kind not in _told:
        _told.add(kind)
        _log.warning("k2train: %s", text)


def retried(read: Callable[[], T], what: object, stop: threading.Event | None = None) -> T:
    """Return `read()`, tried again while it raises an OSError that may pass.

    `what` names the file in what is logged; `stop` ends the wait early. Raises UnavailableError
    after `PATIENCE_SECONDS`, any other error at once.
    """
    began, pause = 0.0, FIRST_PAUSE_SECONDS
    while True:
        try:
            result = read()
        except OSError as error:
            if not is_passing(error):
                raise
            now, number = time.monotonic(), error.errno or errno.EIO
            why = os.strerror(number)
            if not began:
                began = now
                _log.warning(
                    "k2train: %s: %s; trying again for %s", what, why, duration(PATIENCE_SECONDS)
                )
            if now - began >= PATIENCE_SECONDS or (stop is not None and stop.is_set()):
                raise UnavailableError(_unavailable_text(what, number), number) from None
        else:
            if began:
                _log.warning(
                    "k2train: %s: answered after %s", what, duration(time.monotonic() - began)
                )
            return result
        _wait(min(pause, began + PATIENCE_SECONDS - now), stop)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def reason(error: OSError, path: Path | str) -> str:
    """Say why `path` could not be written; on a full disk also whether space or files ran out."""
    text = error.strerror or str(error)
    if error.errno == errno.ENOSPC and not _has_inodes(Path(path)):
        text += " (its inodes are used up, see df -i: remove files)"
    return text


def _has_inodes(path: Path) -> bool:
    """Return whether a file can be made beside `path`, as far as its file system says."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        facts = os.statvfs(path)
    except OSError:
        return True
    # Some file systems have no table of inodes, and count none.
    return facts.f_files == 0 or facts.f_favail > 0


def _unavailable_text(what: object, number: int) -> str:
    """Say that a file could not be used, and what to do."""
    full = number in (errno.ENOSPC, errno.EDQUOT)
    why = os.strerror(number)
    if isinstance(what, Path):
        why = reason(OSError(number, why), what)
    return (
        f"{what}: {why}, for {duration(PATIENCE_SECONDS)}; "
        + ("free space, then " if full else "nothing is known to be damaged: ")
        + "start the same command again"
        + ("" if full else " once the file system answers")
    )


def exists(path: Path) -> bool:
    """Return whether there is a file or folder of that name, for callers that try again themselves.

    `Path.exists` and its like answer False to any error from Python 3.14 on, and a run whose ledger
    "does not exist" begins anew. Raises OSError.
    """
    return _stat(path) is not None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno not in MISSING:
            raise
        return None


def stat_retried(path: Path) -> os.stat_result | None:
    """Return the facts of a file or folder, None if there is none of that name.

    Raises OSError, UnavailableError.
    """
    return retried(lambda: _stat(path), path)


def exists_retried(path: Path) -> bool:
    """Return whether there is a file or folder of that name. Raises OSError, UnavailableError."""
    return stat_retried(path) is not None


def is_file_retried(path: Path) -> bool:
    """Return whether there is a plain file of that name. Raises OSError, UnavailableError."""
    facts = stat_retried(path)
    return facts is not None and stat.S_ISREG(facts.st_mode)


def is_folder_retried(path: Path) -> bool:
    """Return whether there is a folder of that name. Raises OSError, UnavailableError."""
    facts = stat_retried(path)
    return facts is not None and stat.S_ISDIR(facts.st_mode)


def is_link_retried(path: Path) -> bool:
    """Return whether a name is that of a symbolic link. Raises OSError, UnavailableError."""
    try:
        return stat.S_ISLNK(retried(lambda: os.lstat(path), path).st_mode)
    except OSError as error:
        if error.errno not in MISSING:
            raise
        return False


def list_retried(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name; a listing that breaks off begins anew.

    `glob` leaves out folders that it cannot read. Raises OSError, UnavailableError.
    """
    return [folder / name for name in sorted(retried(lambda: os.listdir(folder), folder))]


def is_bad_block(error: UnavailableError, beside: Path) -> bool:
    """Return whether a file itself cannot be read, while its file system answers.

    A bad sector, or a block that fails the file system's own check, is EIO like a server that is
    away. `beside` is another file of that file system; what memory still holds of it is dropped.
    """
    if error.number != errno.EIO:
        return False
    try:
        descriptor = os.open(beside, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return bool(os.read(descriptor, 1))
        finally:
            os.close(descriptor)
    except OSError:
        return False


def open_retried(path: Path, stop: threading.Event | None = None) -> io.BufferedReader:
    """Open a file for reading; every read of it is retried, until `stop` is set.

    Readers of other packages take it in place of a name: their own reads are not retried. It is
    opened anew after an error: a stale handle stays stale. Raises OSError, UnavailableError.
    """
    return io.BufferedReader(_RetriedFile(path, stop), buffer_size=2**20)


def read_retried(path: Path, start: int = 0, count: int | None = None) -> bytearray:
    """Read `count` bytes from `start` on, without a count all that follow; each read is retried.

    `numpy.fromfile` takes an error of a read for the end of the file. Raises EOFError when the file
    ends earlier, OSError, UnavailableError.
    """
    with OpenFile(path) as file:
        return file.read(start, count)


class OpenFile:
    """A file opened once for several `read_retried`; a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, UnavailableError."""
        self.path = path
        self._file = _RetriedFile(path, None)

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: int = 0, count: int | None = None) -> bytearray:
        """Read as `read_retried` does."""
        size = os.fstat(self._file.fileno()).st_size - start if count is None else count
        found = bytearray(size)
        view = memoryview(found)
        self._file.go_to(start)
        while view:
            read = self._file.readinto(view)
            if read == 0:
                raise EOFError(f"{self.path} ends {len(view)} bytes early")
            view = view[read:]
        return found


class _RetriedFile(io.RawIOBase):
    def __init__(self, path: Path, stop: threading.Event | None) -> None:
        super().__init__()
        self._path, self._stop, self._at, self._descriptor = path, stop, 0, -1
        self._descriptor = retried(self._open, path, stop)

    def _open(self) -> int:
        return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._at
        elif whence == os.SEEK_END:
            offset += retried(self._size, self._path, self._stop)
        self._at = offset
        return offset

    def _size(self) -> int:
        try:
            return os.fstat(self.fileno()).st_size
        except OSError:
            self._close_descriptor()
            raise

    def fileno(self) -> int:
        if self._descriptor < 0:
            self._descriptor = retried(self._open, self._path, self._stop)
        return self._descriptor

    def go_to(self, start: int) -> None:
        self._at = start

    def readinto(self, buffer: Any) -> int:
        count = retried(lambda: self._read(buffer), self._path, self._stop)
        self._at += count
        return count

    def _read(self, buffer: Any) -> int:
        if self._descriptor < 0:
            self._descriptor = self._open()
        try:
            return os.preadv(self._descriptor, [buffer], self._at)
        except OSError:
            self._close_descriptor()
            raise

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            with suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = -1

    def close(self) -> None:
        self._close_descriptor()
        super().close()


def _wait(seconds: float, stop: threading.Event | None) -> None:
    number = threading.get_ident()
    _waiting.append(number)
    try:
        if stop is None:
            time.sleep(max(0.0, seconds))
        else:
            stop.wait(max(0.0, seconds))
    finally:
        _waiting.remove(number)
