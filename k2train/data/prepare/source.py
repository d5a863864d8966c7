"""Document sources: a file or a reference page under a stable name, and its hashed contents.

- The text decides the split, or the name: `text_position` and `split_position` map a document or a
  file to a point in [0, 1), and the shares of all recipes divide the same interval. It does not
  depend on a recipe's seed, since two stages with different seeds must still be disjoint.
- Equal texts have equal positions, in whatever subset or file they are.
- Bytes are hashed while they are read, so the identity of a source costs no second read.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2train.data.prepare.containers import decompressed
from k2train.errors import DataError
from k2train.retry import open_retried

POSITIONS = 2**48
"""Split positions are integers below this, so that the boundary of a share is exact."""

BLOCK_BYTES = 2**18


@dataclass(frozen=True)
class Source:
    """A source of documents, named for ever by `origin` and `name`.

    `path` is where the file is now; "" for a page of the reference.
    """

    origin: str
    name: str
    path: str = ""
    size_bytes: int = 0

    @property
    def key(self) -> str:
        """Stable name of the source: `origin/name`."""
        return f"{self.origin}/{self.name}"

    @property
    def facts(self) -> dict[str, Any]:
        """All fields as a dict, for a JSON file."""
        return asdict(self)


def split_position(unit: str) -> int:
    """Position of a unit of splitting, an integer in [0, POSITIONS).

    `unit` is the key of a source, or `source key NUL document name`.
    """
    digest = hashlib.sha256(b"k2train source place\0" + unit.encode()).digest()
    return int.from_bytes(digest[:6], "big")


def text_digest(text: bytes) -> bytes:
    """SHA-256 of a document's text in UTF-8, as the documents are compared by."""
    return hashlib.sha256(text).digest()


def text_hash(digest: bytes) -> int:
    """First 64 bits of a `text_digest`: how runs, plans and `texts.npy` name a text."""
    return int.from_bytes(digest[:8], "big")


def text_position(digest: bytes) -> int:
    """Position of a text with this `text_digest`, an integer in [0, POSITIONS).

    Hashed once more: `text_hash` must not tell which side of a split a text is on.
    """
    return int.from_bytes(hashlib.sha256(b"k2train text place\0" + digest).digest()[:6], "big")


def first_position(fraction: float) -> int:
    """First position at or above `fraction` of [0, 1).

    Exact; a fraction of 1.0 gives `POSITIONS`, one past the last position.
    """
    return math.ceil(fraction * POSITIONS)


class Contents:
    """The bytes of a source, hashed while they are read once from start to end; then see `facts`.

    Every way of reading raises DataError for a file that is missing, truncated, or changed
    meanwhile.
    """

    def __init__(self, source: Source, content: bytes | None = None) -> None:
        """`content` holds the bytes of a source that is not a file."""
        self.source, self.content = source, content
        self._digest = hashlib.sha256()
        self._size_bytes = self._mtime_ns = 0
        self._ended = False

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes as stored in the file, block by block."""
        if self.content is not None:
            self._digest.update(self.content)
            self._size_bytes, self._ended = len(self.content), True
            yield self.content
            return

        path = self.source.path
        try:
            with open_retried(Path(path)) as stream:
                # Size and time at the start, to detect a change while reading.
                before = os.fstat(stream.fileno())
                while block := stream.read(BLOCK_BYTES):
                    self._digest.update(block)
                    self._size_bytes += len(block)
                    yield block
                after = os.fstat(stream.fileno())
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); "
                "it existed when the sources were listed"
            ) from None

        # A file that changed while it was read has no single identity.
        if (self._size_bytes, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DataError(
                f"{path}: changed while it was read; wait "
                "until nothing writes to it, then start again"
            )

        self._mtime_ns, self._ended = after.st_mtime_ns, True

    def read_all(self) -> bytes:
        """Return all bytes at once."""
        return b"".join(self.blocks())

    def hash_only(self) -> None:
        """Read for the hash only, for a format that is not read from front to back."""
        for _ in self.blocks():
            pass

    def unpacked(self) -> Iterator[bytes]:
        """Yield the bytes block by block, decompressed if the file is compressed.

        The first bytes decide, not the name.
        """
        return decompressed(self.source.path or self.source.name, self.blocks())

    def lines(self, keep_ends: bool = False) -> Iterator[bytes]:
        """Yield lines, without their ends unless asked for; compressed files are decompressed.

        The last line may have none.
        """
        end = b"\n" if keep_ends else b""
        # Pieces of a line that spans several blocks.
        partial: list[bytes] = []
        for block in self.unpacked():
            first, *rest = block.split(b"\n")
            partial.append(first)
            if rest:
                yield b"".join(partial) + end
                yield from (line + end for line in rest[:-1])
                partial = [rest[-1]]

        if last := b"".join(partial):
            yield last

    @property
    def facts(self) -> dict[str, Any]:
        """`key`, `bytes`, `sha256` and `mtime_ns` (0 if not a file) of a source that was read."""
        assert self._ended, f"{self.source.key} was not read to its end"
        facts = {
            "bytes": self._size_bytes,
            "sha256": self._digest.hexdigest(),
            "mtime_ns": self._mtime_ns,
        }
        return {"key": self.source.key, **facts}
