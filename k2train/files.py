"""Atomic and durable files: write, fsync, rename; SHA-256 of files.

- A file gets its name by rename after its content is on the disk: it is whole or absent.
- The directory is synced after the rename. Without that a power cut can lose a file whose data was
  written.
- Standard library only.
"""

import hashlib
import os
from pathlib import Path
from typing import IO

from k2train.retry import open_retried


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in blocks, each tried again on an error
    that may pass.
    """
    with open_retried(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Fsync a directory, so that its names survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
