"""Files of the search index: a suffix array for each part of a chunk, and its header.

    chunk_000.0.suffixes.npy    uint32 [tokens]: positions in the part, ascending by what follows
    chunk_000.0.json            chunk and hash, rows, size and hash of the array; written last

- A part is a range of rows, small enough to be sorted in memory. Its positions count tokens from
  the part's first row. Four bytes a token; the tokens themselves stay in the chunk.
- The header names the chunk by its SHA-256 and by the file that was read: size and time of its last
  write. An index of another chunk is refused. A file that was touched is hashed again first.
- Rows are samples of their own: what follows a position ends with its row.

Alternatives considered:
- One array for all chunks, merged: it must be written anew for each chunk that is added, and one
  search over all parts takes a fraction of a second.
- A copy of the tokens in the index: half as large again, and it could differ from the chunk.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from k2train.data.array_file import FileIdentity
from k2train.data.manifest import ChunkInfo, Manifest
from k2train.data.npy import check_size, header_bytes, read_header
from k2train.errors import DataError
from k2train.files import AtomicFile, sha256_file
from k2train.retry import exists_retried, retried, stat_retried
from k2train.safe_json import parse_json, read_plain_file

FORMAT = "k2train-trace-1"
FOLDER = "trace_index"
"""Name of the index's folder inside the data folder, unless another is given."""
SUFFIX_DTYPE = np.dtype("<u4")
MAX_HEADER_BYTES = 2**16
PART_TOKENS = 2**25
"""Tokens sorted at once. Sorting takes about 14 bytes of memory for each."""

Suffixes = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Part:
    """A range of rows of a chunk that is sorted and searched at once."""

    info: ChunkInfo
    number: int
    rows: range

    @property
    def name(self) -> str:
        """Name of its files, without their ends."""
        return f"{self.info.name}.{self.number}"


@dataclass(frozen=True)
class Header:
    """Header of a part: what its array was made of."""

    format: str
    chunk: str
    chunk_sha256: str
    chunk_bytes: int
    chunk_modified_ns: int
    first_row: int
    rows: int
    sequence_length: int
    array_xxh3: str


def parts_of(
    info: ChunkInfo, sequence_length: int, part_tokens: int = PART_TOKENS
) -> Iterator[Part]:
    """Yield the parts of a chunk, in the order of its rows."""
    most = max(1, part_tokens // sequence_length)
    for number, first in enumerate(range(0, info.rows, most)):
        yield Part(info, number, range(first, min(first + most, info.rows)))


def array_path(folder: Path, part: Part) -> Path:
    """Path of a part's suffix array."""
    return folder / f"{part.name}.suffixes.npy"


def header_path(folder: Path, part: Part) -> Path:
    """Path of a part's header."""
    return folder / f"{part.name}.json"


def write_part(
    folder: Path, manifest: Manifest, part: Part, identity: FileIdentity, suffixes: Suffixes
) -> None:
    """Write a part; its header last, so that a part without one does not count."""
    header_path(folder, part).unlink(missing_ok=True)
    with AtomicFile(array_path(folder, part)) as stream:
        stream.write(header_bytes(suffixes.shape, SUFFIX_DTYPE))
        stream.write(suffixes.data.cast("B"))

    header = Header(
        FORMAT,
        part.info.name,
        part.info.sha256,
        identity.size,
        identity.modified_ns,
        part.rows.start,
        len(part.rows),
        manifest.sequence_length,
        xxhash.xxh3_64_hexdigest(suffixes.data),
    )
    with AtomicFile(header_path(folder, part)) as stream:
        stream.write((json.dumps(asdict(header)) + "\n").encode())


def read_part_header(folder: Path, part: Part) -> Header | None:
    """Read a part's header; None when there is none, or it is not one of this format."""
    path = header_path(folder, part)
    if not exists_retried(path):
        return None
    try:
        raw: Any = parse_json(read_plain_file(path, MAX_HEADER_BYTES))
        header = Header(**raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); build the index again") from (
            None
        )
    except (ValueError, TypeError):
        return None
    kinds = {name: type(value) for name, value in asdict(header).items()}
    strings = ("format", "chunk", "chunk_sha256", "array_xxh3")
    wanted = {name: str if name in strings else int for name in kinds}
    return header if kinds == wanted and header.format == FORMAT else None


def fits(header: Header, manifest: Manifest, part: Part) -> bool:
    """Return whether the header is that of the part of this chunk, by name, hash and rows."""
    return (header.chunk, header.chunk_sha256, header.first_row, header.rows) == (
        part.info.name,
        part.info.sha256,
        part.rows.start,
        len(part.rows),
    ) and header.sequence_length == manifest.sequence_length


def check_chunk_file(manifest: Manifest, header: Header) -> None:
    """Check that the chunk's file is what was indexed; hashed again if it was touched since.

    Raises DataError when it has another content.
    """
    info = manifest.chunk(header.chunk)
    path = manifest.folder / info.file
    facts = stat_retried(path)
    if facts is not None:
        now = FileIdentity.of(facts)
        if (now.size, now.modified_ns) == (header.chunk_bytes, header.chunk_modified_ns):
            return
    digest = sha256_file(path) if facts is not None else "missing"
    if digest != header.chunk_sha256:
        raise DataError(
            f"{path}: is not the file that the index was built from: its sha256 is "
            f"{digest[:16]}, the index has {header.chunk_sha256[:16]}; fetch the chunk again"
        )


def open_suffixes(folder: Path, part: Part, tokens: int) -> Suffixes:
    """Map a part's suffix array into memory after checking its size. Raises DataError."""
    path = array_path(folder, part)
    where = f"index of {part.info.name} ({path})"
    found = read_header(path, where)
    if found.shape != (tokens,) or found.dtype != SUFFIX_DTYPE:
        raise DataError(f"{where}: is not the array of {tokens} tokens; delete it and build again")
    check_size(found, found.offset + tokens * SUFFIX_DTYPE.itemsize, where)
    return retried(
        lambda: np.memmap(path, SUFFIX_DTYPE, mode="r", offset=found.offset, shape=(tokens,)), path
    )


def array_digest(suffixes: Suffixes) -> str:
    """Hash of an array as its header has it, read in blocks."""
    digest = xxhash.xxh3_64()
    for begin in range(0, len(suffixes), 2**22):
        digest.update(np.ascontiguousarray(suffixes[begin : begin + 2**22]).data)
    return digest.hexdigest()


def default_folder(manifest: Manifest) -> Path:
    """Folder of the index of a data folder: inside it."""
    return manifest.folder / FOLDER
