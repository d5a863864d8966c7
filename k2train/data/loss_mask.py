"""Loss masks: which tokens of a chunk's rows are learned (`chunk_000.mask.npy`), a bit a token.

- A NumPy array, uint8 `[rows, ceil(sequence_length / 8)]`, the lowest bit first: bit t of a row is
  1 where the token at position t is learned, as the label of position t-1.
- Bit 0 is 0, since nothing predicts a row's first token, and so are the bits behind the last token.
- Every row has at least one 1: a row that teaches nothing is a mistake of whoever wrote it.
- The mask of a chunk says how much it counts, so any rank can count the targets of a whole global
  batch from a few kilobytes, and none has to ask another.

Alternatives considered:
- Labels with -100, as other trainers store them: as large as the chunk again, and a second copy of
  the ids that may disagree with the first.
- Runs of learned tokens: smaller still, but the rows of a range are then found by bisection.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from k2train.data.array_file import ArrayFile, FileIdentity
from k2train.data.manifest import ChunkInfo, Manifest
from k2train.data.npy import check_size, header_bytes, read_header
from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.retry import open_retried

DTYPE = np.dtype("u1")
BLOCK_BYTES = 2**22
"""Bytes of rows verified at once; unpacked they are eight times as many."""

LossMask = Literal["none", "use", "ignore"]
"""What `data.loss_mask` may be."""

Learned = npt.NDArray[np.bool_]


def masked_as_asked(manifest: Manifest, asked: LossMask, where: str = "") -> Manifest:
    """Return the manifest with the loss masks that `data.loss_mask` asks for: whoever reads it
    learns by its masks.

    `where` begins the message about a folder that is not `data.manifest`. Raises DataError where
    masks are there unasked, or asked for and not there: nobody trains on every token, or on some
    of them, without having said so.
    """
    if asked == "none" and manifest.has_masks:
        raise DataError(
            f"{where}{manifest.path} has loss masks, but data.loss_mask is none: "
            "data.loss_mask=use learns the masked tokens only, data.loss_mask=ignore every token"
        )
    if asked == "use" and not manifest.has_masks:
        raise DataError(
            f"{where}{manifest.path} has no loss masks, but data.loss_mask is use: prepare the "
            "data with masks, or set data.loss_mask=none, which learns every token"
        )
    return manifest.without_masks() if asked == "ignore" else manifest


def row_bytes(sequence_length: int) -> int:
    """Bytes of a row's mask."""
    return -(-sequence_length // 8)


def write_mask(path: Path, blocks: Iterable[npt.ArrayLike], rows: int) -> tuple[str, int]:
    """Write the mask of a chunk atomically; return the file's SHA-256 and its number of targets.

    `blocks` are booleans `[n, sequence_length]`, True where the token is learned, with `rows` rows
    in all: blocks keep memory bounded.
    """
    digest, written, targets = hashlib.sha256(), 0, 0
    with AtomicFile(path) as stream:
        for block in blocks:
            learned = np.asarray(block, dtype=np.bool_)
            assert learned.ndim == 2, f"{path}: a block has {learned.ndim} dimensions"
            packed = np.packbits(learned, axis=1, bitorder="little")
            bad = bad_row(packed, written, learned.shape[1])
            assert not bad, f"{path}: {bad}"

            header = b"" if written else header_bytes((rows, packed.shape[1]), DTYPE)
            content = header + packed.tobytes()
            digest.update(content)
            stream.write(content)
            written += len(packed)
            targets += int(learned.sum())
        assert written == rows, f"{path}: {written} rows were written, {rows} expected"
    return digest.hexdigest(), targets


def check_mask(manifest: Manifest, info: ChunkInfo) -> int:
    """Check the header and size of a chunk's mask file; return the bytes before the first row.

    Raises DataError naming the chunk.
    """
    path, where = _path(manifest, info), _where(manifest, info)
    header = read_header(path, where)
    expected = (info.rows, row_bytes(manifest.sequence_length))
    if header.dtype != DTYPE or header.shape != expected or header.fortran:
        layout = "column" if header.fortran else "row"
        raise DataError(
            f"{where}: holds {str(header.dtype)[:60]} {str(list(header.shape))[:60]} in {layout} "
            f"order, the loss mask of {info.rows} rows of {manifest.sequence_length} tokens is "
            f"uint8 {list(expected)} in row order; fetch it again"
        )
    check_size(header, header.offset + info.rows * expected[1], where)
    return header.offset


def open_mask(manifest: Manifest, info: ChunkInfo, stop: Event | None = None) -> ArrayFile:
    """Open the mask of a chunk, packed `[rows, bytes]`, after `check_mask`. Raises DataError.

    `stop` ends the patience with a file system that does not answer.
    """
    offset, path = check_mask(manifest, info), _path(manifest, info)
    shape = (info.rows, row_bytes(manifest.sequence_length))
    return ArrayFile(path, offset, shape, DTYPE, where=_where(manifest, info), stop=stop)


def verify_mask(
    manifest: Manifest, info: ChunkInfo, stopped: Callable[[], bool] | None = None
) -> FileIdentity | None:
    """Verify a whole mask file: its SHA-256, every row, and its number of targets.

    Reads in blocks. Returns the identity of the file that was hashed. `stopped` is called between
    blocks; True ends the check early with None.
    Raises DataError naming the chunk and the row.
    """
    offset, width = check_mask(manifest, info), row_bytes(manifest.sequence_length)
    digest = hashlib.sha256()
    bad, row, targets = "", 0, 0

    with open_retried(_path(manifest, info)) as stream:
        # Before the first byte: a later write shows in it.
        identity = FileIdentity.of(os.fstat(stream.fileno()))
        digest.update(stream.read(offset))
        while block := stream.read(max(1, BLOCK_BYTES // width) * width):
            if stopped is not None and stopped():
                return None
            digest.update(block)
            packed = np.frombuffer(block, dtype=DTYPE).reshape(-1, width)
            bad = bad or bad_row(packed, row, manifest.sequence_length)
            targets += int(count_targets(packed).sum())
            row += len(packed)

    if not bad and targets != info.targets:
        bad = f"the loss mask has {targets} targets, the manifest says {info.targets}"
    if problem := _problem(bad, digest.hexdigest(), str(info.loss_mask_sha256)):
        raise DataError(f"{_where(manifest, info)}: {problem}")
    return identity


def _problem(bad: str, actual: str, expected: str) -> str:
    """What is wrong with a mask file, and what to do about it."""
    # With a good hash a bad row is the fault of whoever wrote it, not the disk's.
    if bad and actual == expected:
        return f"{bad}; prepare the data anew"
    if bad:
        return f"{bad}; its sha256 is not the manifest's either; fetch it again"
    if actual != expected:
        return (
            f"sha256 is {actual[:16]}, the manifest says {expected[:16]}; fetch the file again or "
            "prepare the data anew"
        )
    return ""


def _path(manifest: Manifest, info: ChunkInfo) -> Path:
    assert info.loss_mask is not None, f"{info.name} has no loss mask"
    return manifest.folder / info.loss_mask


def _where(manifest: Manifest, info: ChunkInfo) -> str:
    return f"{info.name} ({_path(manifest, info)})"


def bad_row(packed: npt.NDArray[np.uint8], first_row: int, sequence_length: int) -> str:
    """Describe the first row of packed masks that is none; empty when all are."""
    used = sequence_length - 8 * (packed.shape[1] - 1)
    first, behind = (packed[:, 0] & 1) != 0, (packed[:, -1] >> used) != 0
    empty = packed.max(axis=1) == 0
    wrong = np.flatnonzero(first | behind | empty)
    if not len(wrong):
        return ""

    i = int(wrong[0])
    row = f"row {first_row + i} of the loss mask"
    if empty[i]:
        return f"{row} has no target: nothing of the row is learned"
    if first[i]:
        return f"{row} learns the token at position 0, which nothing predicts"
    return f"{row} has a bit behind its last token, of {sequence_length}"


def count_targets(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Number of learned tokens of each row of packed masks, int64 `[rows]`."""
    bits = np.unpackbits(packed, axis=1)
    counts: npt.NDArray[np.int64] = bits.sum(axis=1, dtype=np.int64)
    return counts


def learned_in(packed: npt.NDArray[np.uint8], sequence_length: int) -> Learned:
    """Which tokens of packed masks are learned: bool `[rows, sequence_length]`."""
    bits: npt.NDArray[Any] = np.unpackbits(packed, axis=1, count=sequence_length, bitorder="little")
    return bits.astype(np.bool_)


def learned_of_rows(manifest: Manifest, info: ChunkInfo, rows: range) -> Learned:
    """Which tokens of rows of a chunk are learned, bool `[len(rows), sequence_length]`.

    Opens the file for this one read. Raises DataError.
    """
    mask = open_mask(manifest, info)
    try:
        packed = read_mask(mask, rows, manifest.sequence_length)
    finally:
        mask.close()
    return learned_in(packed, manifest.sequence_length)


def read_mask(mask: ArrayFile, rows: range, sequence_length: int) -> npt.NDArray[np.uint8]:
    """Packed masks of these rows, uint8 `[len(rows), ceil(sequence_length / 8)]`.

    Raises DataError naming the file and the row for one that is no mask.
    """
    packed = mask.read(rows.start, rows.stop)
    if bad := bad_row(packed, rows.start, sequence_length):
        raise DataError(f"{mask.where}: {bad}; fetch the file again or prepare the data anew")
    return packed
