"""Conversion of one K2 chunk file to a data chunk and back, independent of all other chunks.

- The `.npy` and the `.parquet` are written under temporary names and renamed. A record, written
  last, marks the task done.
- Memory is bounded by a block of lines, whatever the size of the file.
- Alternatives considered: taking an existing file as finished; a file has the right size before it
  is known to come from the right source.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from k2train.data.chunk import ChunkInfo, Manifest, open_chunk, verify_chunk
from k2train.data.manifest import chunk_dtype
from k2train.data.npy import header_bytes
from k2train.data.prepare.k2_format.lines import MAX_LINE_BYTES, Lines, parse_line, parse_lines
from k2train.data.prepare.k2_format.provenance import (
    ProvenanceReader,
    ProvenanceWriter,
    format_lines,
    number_texts,
)
from k2train.errors import DataError
from k2train.files import AtomicFile, sha256_file
from k2train.retry import is_file_retried, open_retried

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

IMPORT_VERSION = 1
"""Part of the identity of an import: increase it when the same files would give other bytes."""
# Fits the processor's cache, since a block is traversed about thirty times.
PIECE_BYTES = 2**18
EXPORT_ROWS = 512
SYNC_BYTES = 2**25


@dataclass(frozen=True)
class ImportTask:
    """Import of one K2 file: `<name>.npy` and `.parquet` in `target`, a record in `records`."""

    file: Path
    name: str
    target: Path
    records: Path
    sequence_length: int
    vocab_size: int

    @property
    def record(self) -> Path:
        """Path of the task's record."""
        return self.records / f"{self.name}.json"

    @property
    def identity(self) -> dict[str, Any]:
        """Facts of the input that a finished task must match."""
        # The time matters only for unfinished work, where at worst it causes a second read.
        facts = self.file.stat()
        return {
            "file": [self.file.name, facts.st_size, facts.st_mtime_ns],
            "shape": [self.sequence_length, self.vocab_size, IMPORT_VERSION],
        }


def finished(task: ImportTask) -> ChunkInfo | None:
    """Result of an earlier start for the same file.

    None unless its record matches and its files have their sizes.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(task.record.read_text("utf-8"))
        sizes = {name: (task.target / name).stat().st_size for name in record["bytes"]}
        if record["identity"] == task.identity and sizes == record["bytes"]:
            return ChunkInfo(**record["info"])
    return None


def import_chunk(task: ImportTask) -> ChunkInfo:
    """Run one import task: write both files, then the record.

    Raises DataError for a broken line, a full disk, and a file that disappeared.
    """
    try:
        identity = task.identity
        info = _write_chunk(task)
        sizes = {
            name: (task.target / name).stat().st_size for name in (info.file, str(info.provenance))
        }
        with AtomicFile(task.record) as stream:
            stream.write(
                json.dumps(
                    {"identity": identity, "bytes": sizes, "info": info.model_dump()}
                ).encode()
            )
    except OSError as error:
        where = error.filename or task.target
        raise DataError(
            f"{task.file.name}: {where}: {error.strerror}; make room or fix this, then start again"
        ) from None

    return info


def _write_chunk(task: ImportTask) -> ChunkInfo:
    """Convert the file: ids and provenance in one pass over its lines."""
    dtype = np.dtype(chunk_dtype(task.vocab_size)).newbyteorder("<")
    names = (f"{task.name}.npy", f"{task.name}.parquet")
    rows = 0
    with ExitStack() as files:
        ids, provenance = (files.enter_context(AtomicFile(task.target / name)) for name in names)
        _write_header(ids, rows, task.sequence_length, dtype)

        writer = files.enter_context(ProvenanceWriter(provenance, task.sequence_length))

        def write(lines: Lines) -> None:
            ids.write(lines.ids.astype(dtype).data)
            writer.add(lines.fields)
            if (
                ids.tell() // SYNC_BYTES
                > (ids.tell() - lines.ids.size * dtype.itemsize) // SYNC_BYTES
            ):
                # Sync gradually, not all at the end when nothing else is left to do.
                ids.flush()
                os.fsync(ids.fileno())

        # A block is written while the next one is read. The thread ends before the files are
        # closed.
        pool = files.enter_context(ThreadPoolExecutor(1))
        written: Future[None] | None = None
        for lines in parse_lines(
            read_pieces(task.file), task.file.name, task.sequence_length, task.vocab_size
        ):
            if written is not None:
                written.result()
            written = pool.submit(write, lines)
            rows += len(lines.ids)

        if written is not None:
            written.result()
        if rows == 0:
            raise DataError(f"{task.file.name}: holds no line; fetch it again")
        # The number of rows is known only now; counting first would read and decompress twice.
        ids.seek(0)
        _write_header(ids, rows, task.sequence_length, dtype)

    per_subset = {
        name: count * task.sequence_length for name, count in sorted(writer.rows_per_subset.items())
    }
    hashes = [sha256_file(task.target / name) for name in names]
    return ChunkInfo(
        name=task.name,
        file=names[0],
        rows=rows,
        tokens=rows * task.sequence_length,
        tokens_per_subset=per_subset,
        sha256=hashes[0],
        provenance=names[1],
        provenance_sha256=hashes[1],
        provenance_content_sha256=writer.digest.hexdigest(),
    )


def _write_header(stream: IO[bytes], rows: int, sequence_length: int, dtype: np.dtype[Any]) -> None:
    stream.write(header_bytes((rows, sequence_length), dtype))
    assert stream.tell() == 128, (
        f"a header of {stream.tell()} bytes cannot be written over the one of no rows"
    )


def read_pieces(path: Path) -> Iterator[bytes]:
    """Yield a file in pieces of bounded size, decompressed when its name ends in `.zst`.

    Raises DataError for a damaged or truncated file, and when zstandard is needed but missing.
    """
    with open_retried(path) as stream:
        if path.suffix != ".zst":
            while piece := stream.read(PIECE_BYTES):
                yield piece
            return
        if zstandard is None:
            raise DataError(
                f"{path.name}: reading .zst needs zstandard: pip install 'k2train[data]'"
            )
        yield from _unpack(path, stream)


def _unpack(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    """Decompress a stream of zstd frames."""
    # zstandard's file reader ends silently where a file was truncated; a decompressobj knows the
    # end of its frame.
    unpacker = None
    try:
        while packed := stream.read(PIECE_BYTES // 8):
            while packed:
                unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
                yield unpacker.decompress(packed)
                packed = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
    except zstandard.ZstdError as error:
        raise DataError(f"{path.name}: cannot be unpacked ({error}); fetch it again") from None
    if unpacker is not None:
        raise DataError(f"{path.name}: truncated: its last zstd frame does not end; fetch it again")


def first_ids(path: Path) -> list[int]:
    """Ids of the first line of a file. Raises DataError when it has none."""
    found = b""
    for piece in read_pieces(path):
        found += piece
        if b"\n" in piece or len(found) > MAX_LINE_BYTES:
            break
    if not found:
        raise DataError(f"{path.name}: holds no line; fetch it again")
    return parse_line(found.split(b"\n", 1)[0], f"{path.name}:1", None)[0]


def export_chunk(manifest: Manifest, info: ChunkInfo, path: Path) -> None:
    """Write one chunk as a K2 file.

    Raises DataError when the chunk or its provenance is damaged.
    """
    provenance = manifest.folder / str(info.provenance)
    verify_chunk(manifest, info)
    if not is_file_retried(provenance) or sha256_file(provenance) != info.provenance_sha256:
        raise DataError(f"{provenance}: missing, or different from the manifest; fetch it again")

    rows, texts = open_chunk(manifest, info), number_texts(manifest.vocab_size)
    with ProvenanceReader(provenance) as reader, AtomicFile(path) as stream:
        fields = reader.fields()
        for start in range(0, info.rows, EXPORT_ROWS):
            ids = rows[start : start + EXPORT_ROWS]
            part = list(islice(fields, len(ids)))
            if len(part) != len(ids):
                raise DataError(
                    f"{provenance}: ends before row {start + len(part)} "
                    f"of {info.rows}; fetch it again"
                )

            stream.write(format_lines(ids, part, texts))
