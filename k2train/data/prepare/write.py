"""Packed subsets to a data folder: chunks, provenance, the list of sources, and the manifest last.

The whole folder is written aside as `<output>.tmp` and renamed when it is complete, so a killed preparation leaves the
old folder or none. Writing chunk by chunk into the final folder was refused: half a folder looks like a whole one to
everything that lists files.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k2train.data.chunk import Tokens, write_chunk
from k2train.data.manifest import (
    MANIFEST_NAME,
    SOURCES_NAME,
    ChunkInfo,
    Manifest,
    read_manifest,
    write_manifest,
)
from k2train.data.prepare.mix import keyed_permutation
from k2train.data.prepare.pack import Packed
from k2train.errors import DataError, UserError
from k2train.files import AtomicFile, sha256_file, sync_directory

try:
    import pyarrow as arrow
    from pyarrow import parquet
except ImportError:
    arrow = parquet = None

# A row group of the chunk: bounds what is in memory beside the packed tokens.
BLOCK_ROWS = 4096


@dataclass(frozen=True)
class ChunkPlan:
    """Which samples of which subset a chunk holds, before its rows are shuffled."""

    name: str
    samples: dict[str, range]

    def rows(self, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Subset index and sample number of each row, shuffled by (seed, chunk name)."""
        subset = np.concatenate([np.full(len(s), i, dtype=np.int64) for i, s in enumerate(self.samples.values())])
        sample = np.concatenate([np.arange(s.start, s.stop, dtype=np.int64) for s in self.samples.values()])
        order = keyed_permutation(len(sample), seed, f"rows of {self.name}")
        return subset[order], sample[order]


def require_pyarrow() -> None:
    """Raises UserError with the command to run when pyarrow is missing: better now than after the packing."""
    if arrow is None:
        raise UserError("preparing data writes Parquet, which needs pyarrow: pip install 'k2train[data]'")


def write_chunk_files(folder: Path, plan: ChunkPlan, packed: Mapping[str, Packed], seed: int, vocab: int) -> ChunkInfo:
    """The chunk's `.npy` and `.parquet`."""
    subset, sample = plan.rows(seed)
    sources = [packed[name] for name in plan.samples]
    length = sources[0].sequence_length
    per_subset = {name: len(samples) * length for name, samples in plan.samples.items()}
    info = write_chunk(folder, plan.name, _blocks(sources, subset, sample), len(sample), vocab, per_subset)
    file = f"{plan.name}.parquet"
    _write_provenance(folder / file, sources, subset, sample)
    return replace(info, provenance=file, provenance_sha256=sha256_file(folder / file))


def _blocks(
    sources: Sequence[Packed], subset: npt.NDArray[np.int64], sample: npt.NDArray[np.int64]
) -> Iterator[Tokens]:
    for start in range(0, len(sample), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        block = np.empty((len(sample[part]), sources[0].sequence_length), dtype=np.uint32)
        for i, source in enumerate(sources):
            mine = subset[part] == i
            block[mine] = source.rows(sample[part][mine])
        yield block


def _write_provenance(
    path: Path, sources: Sequence[Packed], subset: npt.NDArray[np.int64], sample: npt.NDArray[np.int64]
) -> None:
    """One line a piece, since a row of short documents comes from many: row, start, length, subset, source, ..."""
    columns: dict[str, list[Any]] = {
        key: [] for key in ("row", "start", "length", "subset", "source", "document", "offset")
    }
    for row, (i, number) in enumerate(zip(subset.tolist(), sample.tolist(), strict=True)):
        for piece in sources[i].pieces(number):
            document = piece.document
            values = (row, piece.start, piece.length, document.subset, document.source, document.name, piece.offset)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    numbers, names = arrow.int32(), arrow.dictionary(arrow.int32(), arrow.string())
    kinds = {"row": numbers, "start": numbers, "length": numbers, "subset": names, "source": names}
    table = arrow.table(
        {key: arrow.array(values).cast(kinds.get(key)) if key in kinds else values for key, values in columns.items()}
    )
    with AtomicFile(path) as stream:
        parquet.write_table(table, stream, compression="zstd")


def write_sources(folder: Path, sources: Mapping[str, set[str]]) -> str:
    """`sources.json`: for `training` and `held_out`, the sources used; returns its sha256."""
    content = json.dumps({part: sorted(names) for part, names in sources.items()}, indent=1) + "\n"
    with AtomicFile(folder / SOURCES_NAME) as stream:
        stream.write(content.encode())
    return sha256_file(folder / SOURCES_NAME)


class FolderAside:
    """`<output>.tmp` inside the block; renamed over `output` at its end, removed after a mistake."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.aside = output.with_name(output.name + ".tmp")
        self.old = output.with_name(output.name + ".old")

    def __enter__(self) -> Path:
        if self.output.exists() and not _is_ours(self.output):
            raise DataError(f"output: {self.output} exists and is no data folder; name another, or move it away")
        for left in (self.aside, self.old):
            if left.exists():
                shutil.rmtree(left)
        self.aside.mkdir(parents=True)
        return self.aside

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.aside, ignore_errors=True)
            return
        if self.output.exists():
            os.replace(self.output, self.old)
        os.replace(self.aside, self.output)
        sync_directory(self.output.parent)
        shutil.rmtree(self.old, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    # --force deletes what it replaces, so it may only ever replace a data folder or an empty one.
    return folder.is_dir() and ((folder / MANIFEST_NAME).is_file() or not any(folder.iterdir()))


def finish(folder: Path, chunks: Sequence[ChunkInfo], held_out: ChunkInfo | None, **keys: Any) -> Manifest:
    """Write the manifest, which makes the folder a data folder."""
    return write_manifest(folder, chunks=chunks, held_out=held_out, **keys)


def damaged(manifest: Manifest) -> list[str]:
    """Files of a data folder that are missing or do not have the hash of the manifest."""
    expected = {info.file: info.sha256 for info in manifest.all_chunks()}
    expected |= {i.provenance: str(i.provenance_sha256) for i in manifest.all_chunks() if i.provenance}
    if "sources_sha256" in manifest.facts:
        expected[SOURCES_NAME] = manifest.facts["sources_sha256"]
    paths = {name: manifest.folder / name for name in expected}
    return [name for name, path in paths.items() if not path.is_file() or sha256_file(path) != expected[name]]


def existing(output: Path) -> Manifest | None:
    """The manifest in `output`, or None when there is none."""
    return read_manifest(output) if (output / MANIFEST_NAME).is_file() else None
