"""Chunk files: NumPy arrays of token ids, checked against the manifest of their folder.

A data folder holds

- `chunk_000.npy`: ids `[rows, sequence_length]`, uint16 where the vocabulary fits, else uint32;
- `chunk_000.parquet`: the origin of each piece of each row (provenance; never read here);
- `chunk_000.borders.npy`: where documents begin, if requested (see `document_boundaries`);
- `chunk_000.mask.npy`: which tokens are learned, if not all of them (see `loss_mask`);
- `manifest.json`: rows, tokens and SHA-256 of every chunk, written last.

Checks come at two prices:

- `check_files` reads headers only and runs for all chunks before training starts;
- `verify_chunk` reads every byte in bounded memory and runs once per chunk.

Alternatives considered:
- Our own format with an index: rows of fixed length need none, and a plain `.npy` opens anywhere
  with `numpy.load`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from k2train.data.array_file import ArrayFile, FileIdentity
from k2train.data.document_boundaries import check_borders, verify_borders
from k2train.data.loss_mask import check_mask, verify_mask
from k2train.data.manifest import ChunkInfo, Manifest, chunk_dtype, read_manifest, write_manifest
from k2train.data.npy import check_size, header_bytes, read_header
from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.retry import open_retried

__all__ = [
    "ChunkInfo",
    "Manifest",
    "Tokens",
    "bad_id",
    "check_files",
    "open_chunk",
    "read_manifest",
    "verify_chunk",
    "write_chunk",
    "write_manifest",
]

# Large enough that hashing dominates the system calls, small beside the memory of a rank.
BLOCK_BYTES = 8 * 2**20


class ChunkIdentity(NamedTuple):
    """Identities of a chunk's file, of its borders and of its loss mask."""

    tokens: FileIdentity
    borders: FileIdentity | None = None
    mask: FileIdentity | None = None

    def has_files_of(self, then: "ChunkIdentity") -> bool:
        """Return whether nobody touched these files since `then`, which may know more of them."""
        return all(mine in (None, other) for mine, other in zip(self, then, strict=True))

    def has_content_of(self, then: "ChunkIdentity") -> bool:
        """Return whether nobody wrote to them; a new owner or name does not count."""
        return all(
            mine is None or (other is not None and mine.has_content_of(other))
            for mine, other in zip(self, then, strict=True)
        )


Tokens = npt.NDArray[np.unsignedinteger[Any]]


def check_files(manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Check existence, header and exact size of chunks, their document boundaries and masks.

    `names` None means all chunks, the held-out one included. Reads some 128 bytes per file.
    Raises DataError naming the chunk and the numbers.
    """
    for info in (
        manifest.all_chunks() if names is None else [manifest.chunk(name) for name in names]
    ):
        _data_offset(manifest, info)
        if info.borders is not None:
            check_borders(manifest.folder / info.borders, info.name)
        if info.loss_mask is not None:
            check_mask(manifest, info)


def _data_offset(manifest: Manifest, info: ChunkInfo) -> int:
    """Bytes before the first id, after comparing the header with the manifest. Raises DataError."""
    path = manifest.folder / info.file
    where = f"{info.name} ({path})"
    header = read_header(path, where)

    expected_shape = (info.rows, manifest.sequence_length)
    expected_dtype = np.dtype(manifest.dtype).newbyteorder("<")

    if header.shape != expected_shape or header.fortran or header.dtype != expected_dtype:
        layout = "column" if header.fortran else "row"
        raise DataError(
            f"{where}: holds {str(header.dtype)[:60]} {str(list(header.shape))[:60]} "
            f"in {layout} order, the manifest says {expected_dtype} {list(expected_shape)} in row "
            "order"
        )

    check_size(header, header.offset + info.tokens * expected_dtype.itemsize, where)
    return header.offset


def verify_chunk(
    manifest: Manifest, info: ChunkInfo, stopped: Callable[[], bool] | None = None
) -> ChunkIdentity | None:
    """Verify a whole chunk: hash and ids, then document boundaries, then the loss mask.

    Every id is compared with the vocabulary. Reads in blocks. Returns the identities of the files
    that were hashed. `stopped` is called between blocks; True ends the check early with None.
    Raises DataError naming the chunk, and for an id: row, position, id and vocabulary size.
    """
    offset = _data_offset(manifest, info)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    row_bytes = manifest.sequence_length * dtype.itemsize
    digest = hashlib.sha256()

    bad = ""
    row = 0

    with open_retried(manifest.folder / info.file) as stream:
        # Before the first byte: a later write shows in it.
        identity = FileIdentity.of(os.fstat(stream.fileno()))
        # The hash covers the header too.
        digest.update(stream.read(offset))
        while block := stream.read(max(1, BLOCK_BYTES // row_bytes) * row_bytes):
            if stopped is not None and stopped():
                return None
            digest.update(block)
            ids = np.frombuffer(block, dtype=dtype).reshape(-1, manifest.sequence_length)
            bad = bad or bad_id(ids, row, manifest.vocab_size)
            row += len(ids)

    same = digest.hexdigest() == info.sha256
    where = f"{info.name} ({manifest.folder / info.file})"

    # A bad id is reported first: with a good hash it is the preparation's fault, not the disk's.
    if bad:
        raise DataError(
            f"{where}: {bad}" + ("" if same else "; its sha256 is not the manifest's either")
        )
    if not same:
        raise DataError(
            f"{where}: sha256 is {digest.hexdigest()[:16]}, the manifest says {info.sha256[:16]}; "
            f"fetch the chunk again or prepare the data anew"
        )

    found = ChunkIdentity(identity)
    if info.borders is not None:
        assert info.borders_sha256 is not None, (
            f"{info.name}: the manifest was read without the hash of its borders"
        )
        path = manifest.folder / info.borders
        borders = verify_borders(
            path, info.name, info.borders_sha256, info.rows, manifest.sequence_length, stopped
        )
        if borders is None:
            return None
        found = found._replace(borders=borders)
    if info.loss_mask is not None:
        mask = verify_mask(manifest, info, stopped)
        return None if mask is None else found._replace(mask=mask)
    return found


def bad_id(ids: Tokens, first_row: int, vocab_size: int) -> str:
    """Describe the first id of `ids` `[rows, s]` outside the vocabulary.

    Empty when there is none.
    """
    if ids.size == 0 or int(ids.max()) < vocab_size:
        return ""

    row, position = (int(i) for i in np.argwhere(ids >= vocab_size)[0])
    return (
        f"row {first_row + row}, position {position}: id {int(ids[row, position])} is not below "
        f"vocab_size {vocab_size}"
    )


def open_chunk(manifest: Manifest, info: ChunkInfo, stop: Event | None = None) -> ArrayFile:
    """Open a chunk `[rows, sequence_length]` after checking its header and size.

    `stop` ends the patience with a file system that does not answer. Raises DataError.
    """
    offset = _data_offset(manifest, info)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    path = manifest.folder / info.file
    shape = (info.rows, manifest.sequence_length)
    where = f"{info.name} ({path})"
    return ArrayFile(path, offset, shape, dtype, where=where, stop=stop)


def write_chunk(
    folder: Path,
    name: str,
    blocks: Iterable[Tokens],
    rows: int,
    vocab_size: int,
    tokens_per_subset: dict[str, int],
) -> ChunkInfo:
    """Write `<name>.npy` atomically from blocks `[n, sequence_length]` with `rows` rows in all.

    Blocks instead of one array keep memory bounded for any size of chunk.
    Raises DataError for an id outside the vocabulary.
    """
    dtype = np.dtype(chunk_dtype(vocab_size)).newbyteorder("<")
    # The first block gives the sequence length for the header.
    pending: Iterator[Tokens] = iter(blocks)
    block = next(pending)
    sequence_length = block.shape[1]

    digest = hashlib.sha256()
    written = 0
    with AtomicFile(folder / f"{name}.npy") as stream:
        header = header_bytes((rows, sequence_length), dtype)
        digest.update(header)
        stream.write(header)

        while True:
            if bad := bad_id(block, written, vocab_size):
                raise DataError(
                    f"{name}: {bad}; the tokenizer is not the one this vocab_size belongs to"
                )

            content = np.ascontiguousarray(block, dtype=dtype).tobytes()
            digest.update(content)
            stream.write(content)
            written += len(block)

            if (block := next(pending, None)) is None:  # type: ignore[arg-type]
                break
        assert written == rows, f"{name}: {written} rows were written, {rows} expected"

    return ChunkInfo(
        name=name,
        file=f"{name}.npy",
        rows=rows,
        tokens=rows * sequence_length,
        tokens_per_subset=tokens_per_subset,
        sha256=digest.hexdigest(),
    )
