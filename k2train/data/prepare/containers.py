"""Compressed files: one table of decompressors, chosen by a file's first bytes.

- gzip, zstd, bzip2 and xz are read as streams, whatever the file is called. Files of several
  members or frames are read to the end.
- A file that ends inside a member is an error, also one of 0 bytes: `gzip -t` says the same.
- A name that promises a compression which the bytes do not have is an error, too.

Alternatives considered:
- The suffix of the name: `x.JSONL.GZ`, `x.zstd` and gzip under a plain name were taken for text.
- The libraries' own file objects: they accept a file that was truncated between two blocks.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePath
from typing import Any, Protocol

from k2train.errors import DataError, UserError

MAX_INFLATED_BYTES = 2**22
"""Limit of a decompressed block of gzip, bzip2 and xz: text may be compressed a thousandfold.

The library of zstd has no such limit: there a block of the file is inflated at once.
"""
MAX_ZSTD_WINDOW = 2**31
MAGIC_BYTES = 10
"""Bytes at the start of a file that suffice to tell a compression."""


class Stream(Protocol):
    """Decompressor of one member of a file."""

    @property
    def eof(self) -> bool:
        """Whether the member has ended."""

    @property
    def unused_data(self) -> bytes:
        """Bytes after the end of the member."""

    def pieces(self, block: bytes) -> Iterator[bytes]:
        """Yield what a block of the file decompresses to."""


@dataclass(frozen=True)
class Compression:
    """A compression: its name, the first bytes of its files, their suffixes, and a new stream.

    `padding` is whether zeros may follow a member.
    """

    name: str
    magics: tuple[bytes, ...]
    suffixes: tuple[str, ...]
    stream: Callable[[], Stream]
    padding: bool = False


class _Member:
    """What the libraries' decompressors of one member have in common."""

    def __init__(self, member: Any) -> None:
        self._member = member

    @property
    def eof(self) -> bool:
        return bool(self._member.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._member.unused_data)


class _Zlib(_Member):
    """One member of a gzip file."""

    def __init__(self) -> None:
        super().__init__(zlib.decompressobj(wbits=31))

    def pieces(self, block: bytes) -> Iterator[bytes]:
        while block:
            yield self._member.decompress(block, MAX_INFLATED_BYTES)
            block = b"" if self._member.eof else self._member.unconsumed_tail


class _Buffered(_Member):
    """One stream of a bzip2 or xz file; the two classes of the standard library behave alike."""

    def pieces(self, block: bytes) -> Iterator[bytes]:
        yield self._member.decompress(block, MAX_INFLATED_BYTES)
        while not (self._member.eof or self._member.needs_input):
            yield self._member.decompress(b"", MAX_INFLATED_BYTES)


class _Zstd(_Member):
    """One frame of a zstd file."""

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError("reading .zst needs zstandard: pip install 'k2train[data]'") from None
        frames = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
        super().__init__(frames.decompressobj())
        self._error = zstandard.ZstdError

    def pieces(self, block: bytes) -> Iterator[bytes]:
        try:
            yield self._member.decompress(block)
        except self._error as error:
            raise ValueError(str(error)) from None


# Skippable frames, which `pzstd` writes, may be the first of a zstd file.
_SKIPPABLE = tuple(bytes([0x50 + number]) + b"\x2a\x4d\x18" for number in range(16))
# A digit is the size of its blocks; then comes the first block, or the end of an empty file.
_BZIP2 = tuple(
    b"BZh%d" % size + begin
    for size in range(1, 10)
    for begin in (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
)

COMPRESSIONS = (
    Compression("gzip", (b"\x1f\x8b\x08",), (".gz", ".gzip", ".tgz"), _Zlib, padding=True),
    Compression("zstd", (b"\x28\xb5\x2f\xfd", *_SKIPPABLE), (".zst", ".zstd"), _Zstd),
    Compression("bzip2", _BZIP2, (".bz2",), lambda: _Buffered(bz2.BZ2Decompressor())),
    Compression(
        "xz",
        (b"\xfd7zXZ\0",),
        (".xz",),
        lambda: _Buffered(lzma.LZMADecompressor(lzma.FORMAT_XZ)),
        padding=True,
    ),
)
"""Every compression that is read."""


def compression_of(head: bytes) -> Compression | None:
    """The compression of a file that begins with `head`; None for one that has none."""
    return next((c for c in COMPRESSIONS if head.startswith(c.magics)), None)


def promised_compression(name: str) -> Compression | None:
    """The compression that a file's name promises by its suffix, in letters of either case."""
    suffix = PurePath(name).suffix.lower()
    return next((c for c in COMPRESSIONS if suffix in c.suffixes), None)


def plain_name(name: str) -> str:
    """The name without the suffix of a compression."""
    return name[: -len(PurePath(name).suffix)] if promised_compression(name) else name


def decompressed(path: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the decompressed blocks of a file, or its own blocks when it is not compressed.

    `path` is for messages, and tells what the name promises. Raises DataError for a file that is
    cut off, damaged, or not compressed as its name says.
    """
    head, rest = b"", iter(blocks)
    for block in rest:
        head += block
        if len(head) >= MAGIC_BYTES:
            break

    compression, promised = compression_of(head), promised_compression(path)
    if compression is not None:
        yield from _members(path, compression, chain([head], rest))
    elif promised is not None:
        raise DataError(f"{path}: {broken_promise(promised, head)}")
    else:
        yield from chain([head] if head else [], rest)


def broken_promise(promised: Compression, head: bytes) -> str:
    """What is wrong with a file that begins with `head` and is not compressed as promised."""
    if not head:
        return "cut off after 0 bytes: an empty download; fetch it again"
    return (
        f"not a complete {promised.name} file (it does not begin as one); fetch it again, or "
        "give it the name of what it is"
    )


def _members(path: str, compression: Compression, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress all members of a file."""
    stream, read_bytes = compression.stream(), 0
    try:
        for block in blocks:
            read_bytes += len(block)
            while block:
                if stream.eof:
                    # Archives pad the last member with zeros.
                    block = block.lstrip(b"\0") if compression.padding else block
                    if not block:
                        break
                    stream = compression.stream()
                yield from stream.pieces(block)
                # A block may hold the end of one member and the start of the next.
                block = stream.unused_data if stream.eof else b""
    except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DataError(
            f"{path}: not a complete {compression.name} file ({error}); fetch it again"
        ) from None

    if not stream.eof:
        raise DataError(f"{path}: cut off after {read_bytes} bytes; fetch it again")
