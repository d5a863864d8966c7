"""Document boundaries: where documents begin inside the rows of a chunk (`chunk_000.borders.npy`).

- A NumPy array, uint64 `[borders]`, ascending: row * sequence_length + start for each first token
  of a document that is not at the beginning of its row.
- The file is beside the chunk, only if the recipe asks for it.
- The beginning of a row is always a border and is never listed. So a row needs nothing from the row
  before it.

Alternatives considered:
- A document number per token: as large as the chunk. Documents are hundreds of tokens long, and the
  borders of a range of rows are found by bisection.
- The provenance Parquet file: it needs a library that training does without.
"""

import hashlib
import os
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import numpy.typing as npt

from k2train.data.array_file import ArrayFile, FileIdentity
from k2train.data.npy import check_size, header_bytes, read_header
from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.retry import open_retried

DTYPE = np.dtype("<u8")
BLOCK_BORDERS = 2**20
"""Borders read at once during verification: 8 MiB."""

Borders = npt.NDArray[np.uint64]


def write_borders(path: Path, positions: npt.ArrayLike) -> str:
    """Write the borders of a chunk atomically and return the file's SHA-256 for the manifest.

    `positions` `[borders]`: ascending, in tokens from the start of the chunk, without row
    beginnings.
    """
    values = np.ascontiguousarray(positions, dtype=DTYPE)
    assert values.ndim == 1 and bool((values[1:] > values[:-1]).all()), (
        f"{path}: positions are not ascending"
    )

    content = header_bytes(values.shape, DTYPE) + values.tobytes()
    with AtomicFile(path) as stream:
        stream.write(content)
    return hashlib.sha256(content).hexdigest()


def check_borders(path: Path, where: str) -> tuple[int, int]:
    """Check the header and size of a borders file; return (bytes before the first border, count).

    Raises DataError that begins with `where`, the chunk's name.
    """
    where = f"{where} ({path})"
    header = read_header(path, where)
    if header.dtype != DTYPE or len(header.shape) != 1:
        raise DataError(
            f"{where}: holds {str(header.dtype)[:60]} {str(list(header.shape))[:60]}, borders are "
            "uint64 of one dimension; fetch it again"
        )
    check_size(header, header.offset + header.shape[0] * DTYPE.itemsize, where)
    return header.offset, header.shape[0]


def open_borders(path: Path, where: str, stop: Event | None = None) -> ArrayFile:
    """Open the borders of a chunk after `check_borders`. Raises DataError.

    `stop` ends the patience with a file system that does not answer.
    """
    offset, count = check_borders(path, where)
    return ArrayFile(path, offset, (count,), DTYPE, where=f"{where} ({path})", stop=stop)


def verify_borders(
    path: Path,
    where: str,
    sha256: str,
    rows: int,
    sequence_length: int,
    stopped: Callable[[], bool] | None = None,
) -> FileIdentity | None:
    """Verify a whole borders file: its SHA-256, and that every border is inside one of `rows` rows.

    Reads in blocks. Returns the identity of the file that was hashed. `stopped` is called between
    blocks; True ends the check early with None.
    Raises DataError.
    """
    offset, _ = check_borders(path, where)
    digest = hashlib.sha256()
    bad, index, before = "", 0, -1

    with open_retried(path) as stream:
        identity = FileIdentity.of(os.fstat(stream.fileno()))
        digest.update(stream.read(offset))
        while block := stream.read(BLOCK_BORDERS * DTYPE.itemsize):
            if stopped is not None and stopped():
                return None
            digest.update(block)
            values = np.frombuffer(block, dtype=DTYPE)
            bad = bad or bad_border(values, range(rows), sequence_length, index, before)
            index, before = index + len(values), int(values[-1])

    same = digest.hexdigest() == sha256
    if bad:
        raise DataError(
            f"{where} ({path}): {bad}"
            + ("" if same else "; its sha256 is not the manifest's either; fetch it again")
        )
    if not same:
        raise DataError(
            f"{where} ({path}): sha256 is {digest.hexdigest()[:16]}, the manifest says "
            f"{sha256[:16]}; fetch the file again or prepare the data anew"
        )
    return identity


def bad_border(
    values: Borders, rows: range, sequence_length: int, index: int = 0, before: int = -1
) -> str:
    """Describe the first of `values` that is not a border inside `rows`; empty when all are.

    `index` is that of the first value in its file, `before` the border in front of it.
    """
    # Positions of the first token of `rows` and the first one after them.
    low, high = rows.start * sequence_length, rows.stop * sequence_length
    # A value beyond int64 turns negative here, and so is outside the rows too.
    positions = values.astype(np.int64)
    earlier = np.concatenate((np.array([before], dtype=np.int64), positions[:-1]))
    wrong = (
        (positions <= earlier)
        | (positions < low)
        | (positions >= high)
        | (positions % sequence_length == 0)
    )

    if not wrong.any():
        return ""

    i = int(np.flatnonzero(wrong)[0])
    position = int(values[i])
    row, token = divmod(position, sequence_length)
    described = f"border {index + i} is position {position} (row {row}, token {token})"

    if positions[i] < low or positions[i] >= high:
        return (
            f"{described}, outside rows {rows.start} to {rows.stop - 1} of {sequence_length} tokens"
        )
    if positions[i] <= earlier[i]:
        return f"{described}, not above the one before it, {int(earlier[i])}"
    return f"{described}: a row's beginning is a border without being listed"


def documents_of(
    borders: Borders | ArrayFile, rows: range, sequence_length: int, where: str = "borders"
) -> npt.NDArray[np.int32]:
    """Document index of each token in its row, from 0: int32 `[len(rows), sequence_length]`.

    Reads only the borders of these rows. Raises DataError naming `where` and the position for a
    value that is not a border of them.
    """
    # Bisection reads a few borders, where NumPy's search wants the whole file in memory.
    low = bisect_left(borders, rows.start * sequence_length)
    high = bisect_left(borders, rows.stop * sequence_length, low)
    here = borders[low:high]

    if bad := bad_border(here, rows, sequence_length, low):
        raise DataError(f"{where}: {bad}; fetch the file again or prepare the data anew")

    # One at each beginning; the running sum over a row is the document's index.
    begins = np.zeros(len(rows) * sequence_length, dtype=np.int32)
    begins[here.astype(np.int64) - rows.start * sequence_length] = 1
    return begins.reshape(len(rows), sequence_length).cumsum(axis=1, dtype=np.int32)
