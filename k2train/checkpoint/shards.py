"""Checkpoint shard files: written and hashed from memory, read back and verified tensor by tensor.

- The format is safetensors: 8 bytes of length, a JSON header, then the tensors' bytes without gaps.
- The header's metadata gives each block's offsets in the global tensor, in the form that
  torch.distributed.checkpoint reads and writes.
- Every tensor is hashed from memory, not from the file. Only this finds damage that happens on the
  way to the disk.
- Two threads hash (one each tensor, one the whole file) while a third writes.
- Standard library only.

Alternatives considered:
- The writer of torch.distributed.checkpoint: it first joins all tensors into one byte string. That
  costs their size in memory again and leaves only the file to hash.
"""

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

from k2train.safe_json import parse_json

Facts = dict[str, Any]

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
"""Dtype name -> (name in the file, bytes per element)."""
DTYPE_NAMES = {short: name for name, (short, _) in DTYPES.items()}
WRITE_BYTES = 1 << 23
"""Bytes per write: small enough for early writeback, large enough to make call overhead negligible.
"""
READ_BYTES = 1 << 20
"""Bytes hashed at once: still in the core's cache after the read."""
READAHEAD_BYTES = 1 << 23
"""Bytes requested from the disk beyond those, so that it works while they are hashed."""
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
    content: Facts = {
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
    path: Path, blocks: Sequence[Block], on_written: Callable[[], None] = lambda: None
) -> tuple[Facts, Facts]:
    """Write and sync a file of `blocks`; returns its manifest entries (`files`, `shards`).

    Calls `on_written` when everything is written but not yet synced. Raises OSError.
    """
    header = header_of(blocks)
    # The header is part of the file's hash, but of no tensor's.
    file_hash = sha256(header)

    tensors: dict[str, Future[str]] = {}
    waiting: list[Future[Any]] = []
    with (
        ThreadPoolExecutor(1) as file_hasher,
        ThreadPoolExecutor(1) as tensor_hasher,
        path.open("xb", buffering=0) as stream,
    ):
        descriptor, offset = stream.fileno(), 0
        offset = _write(descriptor, memoryview(header), offset)
        for block in blocks:
            content = block.content()
            assert content.nbytes == block.num_bytes, (
                f"{block.name}: {content.nbytes} bytes, not {block.num_bytes}"
            )
            tensors[block.name] = tensor_hasher.submit(_hash, content)
            waiting += [tensors[block.name], file_hasher.submit(file_hash.update, content)]
            offset = _write(descriptor, content, offset)

            # A block made for the file (weights in their own dtype) is released only after both
            # hashes have read it. The limit bounds the memory of pending blocks.
            while len(waiting) > 8:
                waiting.pop(0).result()

        on_written()
        os.fsync(descriptor)
        hashes = {name: future.result() for name, future in tensors.items()}

    shard = {
        "header_sha256": sha256(header).hexdigest(),
        "tensors": {
            block.name: {
                "offsets": list(block.offsets),
                "shape": list(block.shape),
                "sha256": hashes[block.name],
            }
            for block in blocks
        },
    }
    return {"bytes": offset, "sha256": file_hash.hexdigest()}, shard


def _hash(content: memoryview) -> str:
    return sha256(content).hexdigest()


def _write(descriptor: int, content: memoryview, offset: int) -> int:
    """Write all of `content` at byte `offset`; returns the end offset."""
    for start in range(0, content.nbytes, WRITE_BYTES):
        rest = content[start : start + WRITE_BYTES]
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        # Start writeback now, so that the final sync does not begin with everything.
        os.posix_fadvise(descriptor, offset + start, WRITE_BYTES, os.POSIX_FADV_DONTNEED)
    return offset + content.nbytes


def drop_caches(root: Path) -> None:
    """Evict the synced files of a checkpoint from the page cache.

    The next read then comes from the disk, and the memory is free for others.
    """
    for file in root.glob("*/*"):
        with suppress(OSError), file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_header(path: Path) -> tuple[bytes, list[Extent]]:
    """Length prefix and header bytes as stored, and the extents of the file's blocks in byte order.

    Raises OSError, and ValueError when the header is not one of a shard file.
    """
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


def size_problem(path: Path, facts: Facts) -> str | None:
    """Describe what is wrong with the file's existence or size; None when nothing is."""
    try:
        status = path.stat()
    except OSError:
        return "is missing"

    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"

    size = status.st_size
    return (
        None if size == facts["bytes"] else f"has {size} bytes, the manifest says {facts['bytes']}"
    )


def layout_problem(path: Path, shard: Facts, size: int) -> tuple[str | None, list[Extent]]:
    """Describe what is wrong with a file's header, and return the extents of its tensors.

    Every byte of the file belongs to the header or to a tensor.
    """
    try:
        header, extents = read_header(path)
    except (OSError, ValueError) as error:
        return f"has a damaged header ({error})", []

    if sha256(header).hexdigest() != shard["header_sha256"]:
        return "does not match the header in the manifest; it was changed or damaged", []

    offset = len(header)
    for extent in extents:
        known = shard["tensors"].get(extent.name)
        if (
            known is None
            or known["offsets"] != list(extent.offsets)
            or known["shape"] != list(extent.shape)
        ):
            return f"has a tensor {extent.name} that the manifest does not describe so", []

        if (
            extent.start != offset
            or extent.stop - extent.start != prod(extent.shape) * DTYPES[extent.dtype][1]
        ):
            return (
                f"has tensor {extent.name} at bytes {extent.start} to {extent.stop}, it should "
                f"begin at {offset}",
                [],
            )

        offset = extent.stop

    if offset != size:
        return f"has {size - offset} bytes after its last tensor", []
    if missing := sorted(set(shard["tensors"]) - {extent.name for extent in extents}):
        return f"has no tensor {missing[0]}", []
    return None, extents


def hash_range(path: Path, start: int, stop: int) -> str:
    """sha256 of bytes `start` to `stop`. Raises OSError, also when the file ends earlier."""
    found, buffer = sha256(), bytearray(min(READ_BYTES, max(stop - start, 1)))
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while start < stop:
            os.posix_fadvise(
                stream.fileno(), start, min(READAHEAD_BYTES, stop - start), os.POSIX_FADV_WILLNEED
            )
            count = os.preadv(stream.fileno(), [view[: stop - start]], start)
            if count == 0:
                raise OSError(5, f"the file ends at byte {start}")
            found.update(view[:count])
            start += count

    return found.hexdigest()


def first_problem(
    root: Path,
    files: Mapping[str, Facts],
    shards: Mapping[str, Facts],
    names: Iterable[str],
    threads: int = THREADS,
) -> str | None:
    """Describe the first bad file of `names` below `root` by file and tensor, else None.

    `files` and `shards` come from the manifest. A file without an entry in `shards` is hashed as a
    whole.
    """
    tasks: list[tuple[str, str | None, int, int, str]] = []
    for name in names:
        path, facts, shard = root / name, files[name], shards.get(name)
        problem = size_problem(path, facts)
        if problem is None and shard is not None:
            # The header is checked at once, the tensors' bytes in threads below.
            problem, extents = layout_problem(path, shard, facts["bytes"])
            tasks += [
                (name, p.name, p.start, p.stop, shard["tensors"][p.name]["sha256"]) for p in extents
            ]

        if problem is not None:
            return f"{name} {problem}"

        if shard is None:
            # Format 1 has one hash per file.
            tasks.append((name, None, 0, facts["bytes"], facts["sha256"]))

    def check(task: tuple[str, str | None, int, int, str]) -> str | None:
        name, tensor, start, stop, expected = task
        what = "" if tensor is None else f": tensor {tensor}"
        try:
            same = hash_range(root / name, start, stop) == expected
        except OSError as error:
            return f"{name}{what} cannot be read ({error.strerror or error})"

        return (
            None
            if same
            else f"{name}{what} does not match its hash in the manifest; it was changed or damaged"
        )

    if threads == 1:
        return next((problem for problem in map(check, tasks) if problem), None)

    with ThreadPoolExecutor(threads) as pool:
        return next((problem for problem in pool.map(check, tasks) if problem), None)
