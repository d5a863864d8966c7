"""A source: one file, or one page of a reference, by a name that means the same on every machine; and its bytes.

The name decides where a document goes: `place` is a point in [0, 1) for what may be split, a file or a document, and
shares of any two recipes cut the same line. It is not keyed by a recipe's seed, since two stages with different seeds
must still be disjoint.

The bytes are hashed on their way to the reader, so that identity costs no second read. Compressed files are taken apart
here and not by the libraries' own file objects: those take a file that is cut off between two blocks for a whole one.
"""

import hashlib
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2train.errors import DataError, UserError

POSITIONS = 2**48
"""Places are whole numbers below this, so that a share's border is exact."""

BLOCK_BYTES = 2**18
# What a block may grow to at once; text that repeats itself is compressed a thousandfold.
MAX_INFLATED_BYTES = 2**22
MAX_ZSTD_WINDOW = 2**31


@dataclass(frozen=True)
class Source:
    """`path` is where it lies now, and "" for a page of the reference; `origin` and `name` together name it for ever."""

    origin: str
    name: str
    path: str = ""
    size_bytes: int = 0

    @property
    def key(self) -> str:
        return f"{self.origin}/{self.name}"

    @property
    def facts(self) -> dict[str, Any]:
        return asdict(self)


def split_position(unit: str) -> int:
    """Where a unit of splitting (a source's key, or `source key NUL document name`) lies, out of PLACES."""
    digest = hashlib.sha256(b"k2train source place\0" + unit.encode()).digest()
    return int.from_bytes(digest[:6], "big")


def first_position(fraction: float) -> int:
    """The first place that lies in the part of [0, 1) from here on; exact, and 1.0 gives `PLACES`, beyond the last."""
    return math.ceil(fraction * POSITIONS)


class Contents:
    """The bytes of a source, to be read once and to the end; then `facts` says what they were.

    Raises DataError, whichever way it is read: a file that is missing, cut off, or changed while it was read.
    """

    def __init__(self, source: Source, content: bytes | None = None) -> None:
        """`content` is that of a source which is no file."""
        self.source, self.content = source, content
        self._digest = hashlib.sha256()
        self._size_bytes = self._mtime_ns = 0
        self._ended = False

    def blocks(self) -> Iterator[bytes]:
        """The bytes as they lie in the file."""
        if self.content is not None:
            self._digest.update(self.content)
            self._size_bytes, self._ended = len(self.content), True
            yield self.content
            return
        path = self.source.path
        try:
            with open(path, "rb", buffering=0) as stream:
                before = os.fstat(stream.fileno())
                while block := stream.read(BLOCK_BYTES):
                    self._digest.update(block)
                    self._size_bytes += len(block)
                    yield block
                after = os.fstat(stream.fileno())
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); it existed when the sources were listed"
            ) from None
        if (self._size_bytes, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise DataError(
                f"{path}: changed while it was read; wait until nothing writes to it, then start again"
            )
        self._mtime_ns, self._ended = after.st_mtime_ns, True

    def whole(self) -> bytes:
        """All bytes at once."""
        return b"".join(self.blocks())

    def hash_only(self) -> None:
        """Read for the hash only, for a format that is not read front to back."""
        for _ in self.blocks():
            pass

    def lines(self) -> Iterator[bytes]:
        """Lines without their ends, of a file that is compressed if its name says so (.gz, .zst)."""
        suffix = Path(self.source.name).suffix
        blocks = {".gz": self._gzip_blocks, ".zst": self._zstd_blocks}.get(suffix, self.blocks)()
        partial: list[bytes] = []
        for block in blocks:
            first, *rest = block.split(b"\n")
            partial.append(first)
            if rest:
                yield b"".join(partial)
                yield from rest[:-1]
                partial = [rest[-1]]
        if last := b"".join(partial):
            yield last

    def _gzip_blocks(self) -> Iterator[bytes]:
        inflate = zlib.decompressobj(wbits=31)
        try:
            for block in self.blocks():
                while block:
                    if inflate.eof:
                        # Archives pad the last member with zeros.
                        block = block.lstrip(b"\0")
                        if not block:
                            break
                        inflate = zlib.decompressobj(wbits=31)
                    yield inflate.decompress(block, MAX_INFLATED_BYTES)
                    block = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
        except zlib.error as error:
            raise DataError(
                f"{self.source.path}: not a complete gzip file ({error}); fetch it again"
            ) from None
        self._check_complete(inflate.eof)

    def _zstd_blocks(self) -> Iterator[bytes]:
        try:
            import zstandard
        except ImportError:
            raise UserError("reading .zst needs zstandard: pip install 'k2train[data]'") from None
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
        inflate = decompressor.decompressobj()
        try:
            for block in self.blocks():
                while block:
                    if inflate.eof:
                        inflate = decompressor.decompressobj()
                    yield inflate.decompress(block)
                    block = inflate.unused_data if inflate.eof else b""
        except zstandard.ZstdError as error:
            raise DataError(
                f"{self.source.path}: not a complete zstd file ({error}); fetch it again"
            ) from None
        self._check_complete(inflate.eof)

    def _check_complete(self, ended: bool) -> None:
        if not ended and self._size_bytes:
            raise DataError(
                f"{self.source.path}: cut off after {self._size_bytes} bytes; fetch it again"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """`key`, `bytes`, `sha256` and `mtime_ns` (0 for what is no file)."""
        assert self._ended, f"{self.source.key} was not read to its end"
        facts = {
            "bytes": self._size_bytes,
            "sha256": self._digest.hexdigest(),
            "mtime_ns": self._mtime_ns,
        }
        return {"key": self.source.key, **facts}
