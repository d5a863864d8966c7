"""Checkpoint shard files: written and hashed from memory, read back and verified tensor by tensor.

- The format is safetensors: 8 bytes of length, a JSON header, then the tensors' bytes without gaps.
- The header's metadata gives each block's offsets in the global tensor, in the form that
  torch.distributed.checkpoint reads and writes.
- Every tensor is hashed from memory, not from the file. Only this finds damage that happens on the
  way to the disk.
- Each piece of a few megabytes has an XXH3-128, which is as fast as memory: a load checks every
  byte with it. It finds accidents, not forgery.
- The whole file has a SHA-256, for audits, and for `sha256sum` of anybody.
- One thread computes that while another writes.
- No torch and no NumPy.

Alternatives considered:
- The writer of torch.distributed.checkpoint: it first joins all tensors into one byte string. That
  costs their size in memory again and leaves only the file to hash.
- SHA-256 at a load, too: it alone takes longer than the disk.
"""

import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from k2train.checkpoint.manifest import BlockFacts, FileFacts, PieceFacts
from k2train.retry import retried
from k2train.safe_json import parse_json

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
"""Dtype name -> (name in the file, bytes per element)."""
DTYPE_NAMES = {short: name for name, (short, _) in DTYPES.items()}
WRITE_BYTES = 1 << 23
"""Bytes per write: small enough for early writeback, large enough to make call overhead negligible.
"""
PIECE_BYTES = 1 << 22
"""Bytes with a hash of their own: few enough to be read again into a buffer, many enough for a
short list."""
THREADS = 4
MAX_HEADER_BYTES = 1 << 28


@dataclass(frozen=True)
class Block:
    """A block of a global tensor to be written.

    `content` returns its bytes (little-endian, row-major).
    """

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    content: Callable[[], memoryview]

    @property
    def num_bytes(self) -> int:
        """Size of the block in bytes."""
        return prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Extent:
    """Byte extent of a block in a file: bytes `start` to `stop`."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int


def header_of(blocks: Sequence[Block]) -> bytes:
    """Length prefix and header of a file of `blocks`, in their order."""
    content: dict[str, Any] = {
        "__metadata__": {
            "DCP_SHARDING_INFO": json.dumps(
                {b.name: {"saved_offsets": list(b.offsets)} for b in blocks}
            ),
            "DCP_VERSION": "1.0",
            "format": "pt",
        }
    }
    offset = 0
    for block in blocks:
        end = offset + block.num_bytes
        content[block.name] = {
            "dtype": DTYPES[block.dtype][0],
            "shape": list(block.shape),
            "data_offsets": [offset, end],
        }
        offset = end

    text = json.dumps(content, separators=(",", ":")).encode()
    # Padded, so that the tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(
    path: Path,
    blocks: Sequence[Block],
    on_written: Callable[[], None] = lambda: None,
    most_waiting: int = 4,
) -> tuple[FileFacts, PieceFacts]:
    """Write and sync a file of `blocks`; returns its facts, and those of its side file.

    Calls `on_written` when everything is written but not yet synced. At most `most_waiting` blocks
    stay in memory until they are hashed, while the next is made. Raises OSError.
    """
    header = header_of(blocks)
    # The header is part of the file's hash, but of no piece's.
    file_hash = sha256(header)

    tensors: dict[str, BlockFacts] = {}
    waiting: list[Future[Any]] = []
    with ThreadPoolExecutor(1) as file_hasher, path.open("xb", buffering=0) as stream:
        descriptor, offset = stream.fileno(), 0
        offset = _write(descriptor, memoryview(header), offset)
        for block in blocks:
            content = block.content()
            assert content.nbytes == block.num_bytes, (
                f"{block.name}: {content.nbytes} bytes, not {block.num_bytes}"
            )
            waiting.append(file_hasher.submit(file_hash.update, content))
            tensors[block.name] = BlockFacts(
                offsets=list(block.offsets), shape=list(block.shape), xxh3_128=piece_hashes(content)
            )
            offset = _write(descriptor, content, offset)

            # A block made for the file (weights in their own dtype) is released only after the
            # hash has read it. The limit bounds the memory of pending blocks.
            while len(waiting) > most_waiting:
                waiting.pop(0).result()
            del content

        on_written()
        os.fsync(descriptor)
        for future in waiting:
            future.result()

    pieces = PieceFacts(
        header_sha256=sha256(header).hexdigest(), piece_bytes=PIECE_BYTES, tensors=tensors
    )
    return FileFacts(bytes=offset, sha256=file_hash.hexdigest()), pieces


def piece_hashes(content: memoryview) -> list[str]:
    """XXH3-128 in hexadecimal of every PIECE_BYTES of a block, the last one shorter."""
    return [
        xxhash.xxh3_128_hexdigest(content[start : start + PIECE_BYTES])
        for start in range(0, content.nbytes, PIECE_BYTES)
    ]


def _write(descriptor: int, content: memoryview, offset: int) -> int:
    """Write all of `content` at byte `offset`; returns the end offset."""
    for start in range(0, content.nbytes, WRITE_BYTES):
        rest = content[start : start + WRITE_BYTES]
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        # Start writeback now, so that the final sync does not begin with everything.
        os.posix_fadvise(descriptor, offset + start, WRITE_BYTES, os.POSIX_FADV_DONTNEED)
    return offset + content.nbytes


def drop_caches(root: Path, names: Iterable[str] | None = None) -> None:
    """Evict the synced files of a checkpoint (or those with `names`) from the page cache.

    The next read then comes from the disk, and the memory is free for others.
    """
    with suppress(OSError):
        for file in root.glob("*/*") if names is None else (root / name for name in names):
            with suppress(OSError), file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_header(path: Path) -> tuple[bytes, list[Extent]]:
    """Length prefix and header bytes as stored, and the extents of the file's blocks in byte order.

    Raises OSError, UnavailableError, and ValueError when the header is not one of a shard file.
    """
    return retried(lambda: _read_header_once(path), path)


def _read_header_once(path: Path) -> tuple[bytes, list[Extent]]:
    # O_NONBLOCK: a pipe in place of the file must not block the reader.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
        facts = os.fstat(stream.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("not a regular file")

        length = stream.read(8)
        size = int.from_bytes(length, "little")

        # A damaged length must not make the reader allocate it.
        if size > min(MAX_HEADER_BYTES, facts.st_size):
            raise ValueError(f"the header claims {size} bytes")

        text = stream.read(size)

    extents = _parse_extents(text, 8 + size)
    for extent in extents:
        # A manifest of format 1 does not describe a file's tensors, so only the file bounds a
        # shape.
        wanted = prod(extent.shape) * DTYPES[extent.dtype][1]
        if (
            min(extent.shape, default=0) < 0
            or extent.stop - extent.start != wanted
            or extent.stop > facts.st_size
        ):
            problem = (
                f"tensor {extent.name[:100]!r} has bytes {extent.start} to {extent.stop}, shape "
                f"{extent.shape}"
            )
            raise ValueError(problem[:200])

    return length + text, extents


def _parse_extents(text: bytes, begin: int) -> list[Extent]:
    try:
        content = parse_json(text)
        metadata = content.pop("__metadata__")
        sharding = parse_json(metadata["DCP_SHARDING_INFO"])
        found = [
            Extent(
                name,
                tuple(map(int, sharding[name]["saved_offsets"])),
                tuple(map(int, facts["shape"])),
                DTYPE_NAMES[facts["dtype"]],
                begin + int(facts["data_offsets"][0]),
                begin + int(facts["data_offsets"][1]),
            )
            for name, facts in content.items()
        ]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"the header is not a shard's ({error!r:.200})") from None

    return sorted(found, key=lambda extent: (extent.start, extent.stop))
