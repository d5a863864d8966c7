"""Atomic and durable files: write, fsync, rename; SHA-256 of files.

- A file gets its name by rename after its content is on the disk: it is whole or absent.
- The directory is synced after the rename. Without that a power cut can lose a file whose data was
  written.
- Some file systems (FUSE, object stores, network shares) have no hard links, or cannot sync a
  directory. Then another way is taken, which is said once.
- Standard library only.

Alternatives considered:
- Refusing such file systems: durability rests on them either way, and they are what some have.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from k2train.retry import open_retried, tell_once

NO_DIRECTORY_SYNC = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.ENOTTY}
)
"""Error numbers of file systems that cannot fsync a directory."""
HASH_BLOCK_BYTES = 8 * 2**20
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})
"""Error numbers of file systems that cannot lock a folder."""
NO_LINKS = frozenset(
    {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}
)
"""Error numbers of file systems without hard links."""


def sha256_file(path: Path, progress: Callable[[], None] | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in blocks, each tried again on an error
    that may pass. `progress` is called after each.
    """
    with open_retried(path) as stream:
        if progress is None:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
            progress()
        return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Fsync a directory, so that its names survive a power cut.

    Where a file system cannot, that is said once: names then last as well as it keeps them.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise
        tell_once(
            "directory sync",
            f"{path}: this file system cannot fsync a folder ({error.strerror}), so a power cut "
            "may take back the newest files there; everything else is as usual",
        )
    finally:
        os.close(descriptor)


def create_once(path: Path, content: bytes, temporary: Path, synced: bool = True) -> int | None:
    """Create `path` with its content, as the only one of many processes; None for the others.

    Returns a descriptor, open for reading and writing. `temporary` is a name beside it that nobody
    else uses. A hard link publishes the file complete, and synced unless told otherwise. Where
    there are no links, the file is created under its name and then written: a reader may find it
    short for a moment, and after a kill in that moment for good.
    """
    temporary.unlink(missing_ok=True)
    descriptor = _created(temporary, content, synced)
    try:
        os.link(temporary, path)
    except FileExistsError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        if error.errno not in NO_LINKS:
            raise
        tell_once(
            "hard links",
            f"{path.parent}: this file system has no hard links ({error.strerror}); what exactly "
            "one process may make there is created by name and then written",
        )
        try:
            descriptor = _created(path, content, synced)
        except FileExistsError:
            return None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return descriptor


def _created(path: Path, content: bytes, synced: bool) -> int:
    """Create a file that must not exist; returns its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(descriptor, content, 0)
        if synced:
            os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return descriptor


def is_stream(path: Path) -> bool:
    """Whether a path is there and takes what is written: a device, a pipe, an open file's name.

    Raises OSError for a disk and for a socket, which are neither written nor replaced.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OSError(errno.ENODEV, "is a disk or a socket, and no file", str(path))
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return True
    try:
        # `/dev/stdout` is a link into /proc, also where it leads to a file.
        return os.readlink(path).startswith("/proc/") and stat.S_ISREG(mode)
    except OSError:
        return False


class AtomicFile:
    """Context manager for a binary file that appears whole and synced, or not at all.

    `mark` separates the temporary files of two processes that write the same file at once. A device
    or a pipe (`/dev/null`, `/dev/stdout`) is written as it is: a file of its name would replace it.
    Raises IsADirectoryError for a path that only a folder can have.
    """

    def __init__(self, path: Path, mark: str = "") -> None:
        if path.name in ("", ".."):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        self.path = path
        self.temporary = path.with_name(f"{path.name}{mark}.tmp")
        self.streams = is_stream(path)

    def __enter__(self) -> IO[bytes]:
        self.stream = self.path.open("ab") if self.streams else self.temporary.open("wb")
        return self.stream

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.stream.flush()
                if not self.streams:
                    os.fsync(self.stream.fileno())
        finally:
            self.stream.close()

        if self.streams:
            return
        if kind is None:
            os.replace(self.temporary, self.path)
            sync_directory(self.path.parent)
        else:
            self.temporary.unlink(missing_ok=True)


def write_synced(path: Path, text: str) -> None:
    """Write a small text file atomically; it is on the disk on return.

    Raises IsADirectoryError for a path that only a folder can have.
    """
    with AtomicFile(path) as stream:
        stream.write(text.encode())


class OwnFolder:
    """A new folder that this process alone writes, until `close`: two never share a temporary name.

    What a process has left that was killed is removed. Raises BlockingIOError, and changes nothing,
    while another one is at work there; OSError when the disk refuses. The kernel releases the lock
    however its holder ends. Where a file system has no locks, there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.suppress(FileNotFoundError):
            before = locked_folder(path)
            try:
                shutil.rmtree(path)
            finally:
                os.close(before)
        path.mkdir(parents=True)
        self._descriptor = locked_folder(path)

    def close(self) -> None:
        """Remove the folder, if it still has its name, and release the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def locked_folder(folder: Path) -> int:
    """Return a descriptor that holds the lock of a folder. Raises BlockingIOError, OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
    return descriptor


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is at work in `folder`, and keep others waiting until the end.

    The kernel releases the lock however its holder ends, and nothing of it stays on the disk. Where
    a file system has no locks, there is none. Raises OSError.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty, in their order; the others stay."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
