"""Sharded safetensors of Hugging Face, written as a stream: header first, then tensor by tensor.

- Only the shapes must be known before. So memory holds the tensor that is written, and the one
  that is read meanwhile.
- The cut into shards, the headers and the index follow from names, shapes and dtypes alone: the
  same weights give the same bytes.
- Each file is hashed from memory while it is written, by another thread.

Alternatives considered:
- safetensors' own writer: it takes all tensors of a file at once.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from k2train.checkpoint.shards import WRITE_BYTES

INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"fp32": ("F32", 4), "bf16": ("BF16", 2)}
"""Precision -> its name in a file, and bytes per element."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class FileTensor:
    """A tensor that is to be written: our name, its name in the file, shape and precision."""

    source: str
    name: str
    shape: tuple[int, ...]
    precision: str

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * DTYPES[self.precision][1]


@dataclass(frozen=True)
class Shard:
    """A file and its tensors, in their order."""

    file: str
    tensors: tuple[FileTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class WrittenFile:
    """A file as it was written."""

    file: str
    bytes: int
    sha256: str


def plan_shards(tensors: Sequence[FileTensor], shard_bytes: int) -> list[Shard]:
    """Cut the tensors, in their order, into files of at most `shard_bytes`, or one tensor."""
    parts: list[list[FileTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if parts[-1] and filled + tensor.num_bytes > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.num_bytes

    if len(parts) == 1:
        return [Shard(SINGLE_FILE, tuple(parts[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(parts):05d}.safetensors", tuple(part))
        for number, part in enumerate(parts, 1)
    ]


def index_json(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return the content of the index: which file holds which tensor."""
    return {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
    }


def header_of(shard: Shard) -> bytes:
    """Length prefix and header of a file."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard.tensors:
        end = offset + tensor.num_bytes
        content[tensor.name] = {
            "dtype": DTYPES[tensor.precision][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    # Padded, so that the tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shards(
    folder: Path, shards: Sequence[Shard], read: Callable[[FileTensor], memoryview]
) -> list[WrittenFile]:
    """Write and sync all files; `read` gives the bytes of a tensor, one ahead of the write.

    Raises OSError, and what `read` raises.
    """
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    with ThreadPoolExecutor(1) as hasher:
        contents = read_ahead(read, tensors)
        return [_write_shard(folder, shard, contents, hasher) for shard in shards]


def read_ahead(read: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Yield `read` of each item; the next one is read while the last one is used."""
    with ThreadPoolExecutor(1) as reader:
        waiting: Future[U] | None = None
        for item in items:
            ready, waiting = waiting, reader.submit(read, item)
            if ready is not None:
                yield ready.result()
                # Not kept while the next one is waited for.
                del ready
        if waiting is not None:
            yield waiting.result()


def _write_shard(
    folder: Path, shard: Shard, contents: Iterator[memoryview], hasher: ThreadPoolExecutor
) -> WrittenFile:
    header = header_of(shard)
    digest, size = sha256(header), len(header)
    with (folder / shard.file).open("xb", buffering=0) as stream:
        descriptor = stream.fileno()
        _write(descriptor, memoryview(header), 0)
        for tensor in shard.tensors:
            content = next(contents)
            assert content.nbytes == tensor.num_bytes, (
                f"{tensor.name}: {content.nbytes} bytes, not {tensor.num_bytes}"
            )
            hashed = hasher.submit(digest.update, content)
            _write(descriptor, content, size)
            size += content.nbytes
            # The bytes belong to a tensor that is released now.
            hashed.result()
            del content, hashed
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return WrittenFile(shard.file, size, digest.hexdigest())


def _write(descriptor: int, content: memoryview, offset: int) -> None:
    for start in range(0, content.nbytes, WRITE_BYTES):
        rest = content[start : start + WRITE_BYTES]
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        # Start writeback now, so that the final sync does not begin with everything.
        os.posix_fadvise(descriptor, offset + start, WRITE_BYTES, os.POSIX_FADV_DONTNEED)
