"""Chunk verification: every byte of a chunk against the manifest, and of the files beside it.

- Everything is read in blocks, so memory does not grow with the chunks.
- Every problem is reported, so that all damaged files can be fetched again at once.
- Hashes come first; a file with a wrong hash is not examined further.
- Then the files are compared with each other. The provenance covers every row exactly, its tokens
  per subset are those of the manifest, and the borders are the beginnings of its pieces. Every row
  of a loss mask learns something, and its targets are those of the manifest.
- `folder` checks the rest of the data folder.

Alternatives considered:
- Reading the provenance as one table: for a chunk of K2 it is gigabytes.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k2train.data.array_file import ArrayFile
from k2train.data.chunk import ChunkInfo, Manifest, verify_chunk
from k2train.data.document_boundaries import open_borders
from k2train.data.loss_mask import verify_mask
from k2train.data.provenance_digest import ProvenanceDigest
from k2train.data.verify.folder import HASH_DIGITS, differing, hash_problem
from k2train.errors import DataError, UnavailableError, UserError
from k2train.retry import open_retried, stat_retried

try:
    import pyarrow as arrow
    from pyarrow import parquet
except ImportError:
    arrow = parquet = None

BATCH_PIECES = 65536

Positions = npt.NDArray[np.int64]


@dataclass
class Report:
    """Result for one chunk; the chunk is whole when there are no problems."""

    info: ChunkInfo
    problems: list[str] = field(default_factory=list)
    pieces: int = 0
    read_bytes: int = 0
    seconds: float = 0.0


def verify_chunks(
    manifest: Manifest, infos: Sequence[ChunkInfo], workers: int = 1
) -> Iterator[Report]:
    """Yield a report per chunk in the order of `infos`, with `workers` chunks read at once.

    Raises UserError when pyarrow is missing.
    """
    if parquet is None and any(info.provenance for info in infos):
        raise UserError("reading provenance needs pyarrow: pip install 'k2train[data]'")

    # Threads: hashing and unpacking release the interpreter lock, and all share one memory.
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda info: verify_files(manifest, info), infos)


def verify_files(manifest: Manifest, info: ChunkInfo) -> Report:
    """Verify every file of one chunk; reads each once, the provenance twice."""
    report = Report(info)
    begun = time.monotonic()

    try:
        # Checked separately: with its borders the chunk's check would stop at a bad chunk.
        verify_chunk(manifest, _tokens_alone(info))
    except (DataError, UnavailableError) as error:
        report.problems.append(_with_distinct_hashes(manifest, info, str(error)))

    _check_mask(manifest, info, report)
    borders = _borders(manifest, info, report)
    if info.provenance is not None:
        path = manifest.folder / info.provenance
        if problem := hash_problem(path, str(info.provenance_sha256)):
            report.problems.append(f"{info.name} {problem}")
        else:
            _check_provenance(manifest, path, borders, report)

    # Imported folders may have no counts per subset.
    if info.tokens_per_subset and (total := sum(info.tokens_per_subset.values())) != info.tokens:
        report.problems.append(
            f"{info.name} ({manifest.path}): tokens_per_subset add up to {total}, tokens is "
            f"{info.tokens}"
        )

    files = (manifest.folder / name for name in info.files())
    report.read_bytes = sum(facts.st_size for path in files if (facts := stat_retried(path)))
    report.seconds = time.monotonic() - begun
    return report


def _with_distinct_hashes(manifest: Manifest, info: ChunkInfo, problem: str) -> str:
    """Reword a hash problem whose two shortened hashes would look equal."""
    digits = info.sha256[:HASH_DIGITS]
    if f"sha256 is {digits}, the manifest says {digits};" not in problem:
        return problem
    return f"{info.name} {hash_problem(manifest.folder / info.file, info.sha256)}"


def _tokens_alone(info: ChunkInfo) -> ChunkInfo:
    gone = ("borders", "borders_sha256", "loss_mask", "loss_mask_sha256", "targets")
    return info.model_copy(update=dict.fromkeys(gone))


def _check_mask(manifest: Manifest, info: ChunkInfo, report: Report) -> None:
    if info.loss_mask is None:
        return
    path = manifest.folder / info.loss_mask
    if problem := hash_problem(path, str(info.loss_mask_sha256)):
        report.problems.append(f"{info.name} {problem}")
        return
    try:
        verify_mask(manifest, info)
    except (DataError, UnavailableError) as error:
        report.problems.append(str(error))


def _borders(manifest: Manifest, info: ChunkInfo, report: Report) -> ArrayFile | None:
    if info.borders is None:
        return None
    path = manifest.folder / info.borders
    if problem := hash_problem(path, str(info.borders_sha256)):
        report.problems.append(f"{info.name} {problem}")
        return None
    try:
        return open_borders(path, info.name)
    except (DataError, UnavailableError) as error:
        report.problems.append(str(error))
        return None


def _check_provenance(
    manifest: Manifest, path: Path, borders: ArrayFile | None, report: Report
) -> None:
    where = f"{report.info.name} ({path})"
    pieces = _Pieces(report.info.rows, manifest.sequence_length, borders)
    digest, recorded = ProvenanceDigest(), report.info.provenance_content_sha256
    columns = ["row", "start", "length", "subset"] if recorded is None else None
    try:
        # Without these two options whole row groups of columns are fetched at once.
        with (
            open_retried(path) as stream,
            parquet.ParquetFile(stream, pre_buffer=False, buffer_size=2**20) as file,
        ):
            for batch in file.iter_batches(BATCH_PIECES, columns=columns):
                pieces.add(batch)
                digest.add(batch)
                if pieces.problem:
                    break
    except (OSError, KeyError, ValueError, arrow.ArrowException) as error:
        report.problems.append(
            f"{where}: is not the provenance of a chunk ({str(error).splitlines()[0]})"
        )
        return

    report.pieces = pieces.count
    if problem := pieces.problem or pieces.end():
        report.problems.append(f"{where}: {problem}")
        return

    if recorded not in (None, digest.hexdigest()):
        here, there = differing(digest.hexdigest(), str(recorded))
        report.problems.append(
            f"{where}: its columns have the hash {here}, the manifest says {there}"
        )

    expected = report.info.tokens_per_subset
    for name in sorted({*expected, *pieces.tokens}):
        if (found := pieces.tokens[name]) != expected.get(name, 0):
            report.problems.append(
                f"{where}: has {found} tokens of subset {name}, the manifest says "
                f"{expected.get(name, 0)}"
            )


class _Pieces:
    """Running check of a chunk's pieces: each must begin where the previous one ended."""

    def __init__(self, rows: int, sequence_length: int, borders: ArrayFile | None) -> None:
        self.rows, self.length, self.borders = rows, sequence_length, borders
        self.tokens: Counter[str] = Counter()
        self.count = 0
        self.problem = ""
        self._position = 0
        self._borders_seen = 0

    def add(self, batch: Any) -> None:
        """Check a batch with the columns row, start, length and subset."""
        row, start, length = (
            batch.column(name).to_numpy(zero_copy_only=False).astype(np.int64)
            for name in ("row", "start", "length")
        )

        # Positions in tokens from the start of the chunk.
        begins = row * self.length + start
        expected = self._position + np.cumsum(length) - length
        bad = (begins != expected) | (length < 1) | (start < 0) | (start + length > self.length)

        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            at = divmod(int(expected[i]), self.length)
            self.problem = (
                f"piece {self.count + i} is row {row[i]}, start {start[i]}, length {length[i]}; "
                f"row {at[0]}, start {at[1]} of {self.length} comes next: a row is not covered "
                "exactly"
            )
            return

        self._position += int(length.sum())
        self.count += len(row)
        self._count_subsets(batch.column("subset"), length)
        if self.borders is not None:
            # Row beginnings are borders without being listed.
            self._compare_borders(begins[start > 0])

    def _count_subsets(self, column: Any, length: Positions) -> None:
        column = column if arrow.types.is_dictionary(column.type) else column.dictionary_encode()
        if column.null_count:
            self.problem = f"a piece before piece {self.count} has no subset"
            return

        names = column.dictionary.to_pylist()
        counts = np.bincount(column.indices.to_numpy(), weights=length, minlength=len(names))
        # Weights are doubles, exact for the counts of a batch.
        self.tokens.update(
            {name: int(count) for name, count in zip(names, counts, strict=True) if count}
        )

    def _compare_borders(self, begins: Positions) -> None:
        assert self.borders is not None, "compared only where there are borders"
        recorded = self.borders[self._borders_seen : self._borders_seen + len(begins)].astype(
            np.int64
        )
        same = np.array_equal(recorded, begins)
        if not same:
            shared = min(len(recorded), len(begins))
            differ = np.flatnonzero(recorded[:shared] != begins[:shared])
            i = int(differ[0]) if len(differ) else shared
            self.problem = (
                f"a piece begins at {self._at(begins, i)}, border {self._borders_seen + i} is "
                f"{self._at(recorded, i)}"
            )
        self._borders_seen += len(begins)

    def _at(self, positions: Positions, i: int) -> str:
        if i >= len(positions):
            return "missing"
        return "row {}, token {}".format(*divmod(int(positions[i]), self.length))

    def end(self) -> str:
        """Describe what is missing after the last piece; empty when all is covered."""
        if self._position != self.rows * self.length:
            return f"ends at row {self._position // self.length}, the chunk has {self.rows} rows"
        if self.borders is not None and self._borders_seen != len(self.borders):
            return (
                f"has {self._borders_seen} pieces that begin inside a row, the borders file "
                f"has {len(self.borders)}"
            )
        return ""
