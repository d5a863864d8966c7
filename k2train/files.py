"""Files that are whole or not there, and hashes of them: what chunks, checkpoints and records all rest on.

A name is given by rename after the content is on the disk, and the directory is synced after the rename: without the
second a power cut may lose a file whose data was written. Standard library only.
"""

import hashlib
import os
from pathlib import Path
from typing import IO


def sha256_file(path: Path) -> str:
    """Hash of a whole file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Return when the names in a directory would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Return when the content of a file would survive a power cut."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


class AtomicFile:
    """A binary file that appears under its name whole and synced, or not at all.

    `mark` keeps two processes that write the same file at once out of each other's unfinished one.
    """

    def __init__(self, path: Path, mark: str = "") -> None:
        self.path = path
        self.aside = path.with_name(f"{path.name}{mark}.tmp")

    def __enter__(self) -> IO[bytes]:
        self.stream = self.aside.open("wb")
        return self.stream

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.stream.flush()
                os.fsync(self.stream.fileno())
        finally:
            self.stream.close()
        if kind is None:
            os.replace(self.aside, self.path)
            sync_directory(self.path.parent)
        else:
            self.aside.unlink(missing_ok=True)


def write_synced(path: Path, text: str) -> None:
    """A small text file, whole and on the disk on return."""
    with AtomicFile(path) as stream:
        stream.write(text.encode())
