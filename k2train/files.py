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
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from k2train.retry import open_retried, tell_once

NO_DIRECTORY_SYNC = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.ENOTTY}
)
"""Error numbers of file systems that cannot fsync a directory."""
HASH_BLOCK_BYTES = 8 * 2**20
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


class AtomicFile:
    """Context manager for a binary file that appears whole and synced, or not at all.

    `mark` separates the temporary files of two processes that write the same file at once.
    """

    def __init__(self, path: Path, mark: str = "") -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}{mark}.tmp")

    def __enter__(self) -> IO[bytes]:
        self.stream = self.temporary.open("wb")
        return self.stream

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.stream.flush()
                os.fsync(self.stream.fileno())
        finally:
            self.stream.close()

        if kind is None:
            os.replace(self.temporary, self.path)
            sync_directory(self.path.parent)
        else:
            self.temporary.unlink(missing_ok=True)


def write_synced(path: Path, text: str) -> None:
    """Write a small text file atomically; it is on the disk on return."""
    with AtomicFile(path) as stream:
        stream.write(text.encode())
