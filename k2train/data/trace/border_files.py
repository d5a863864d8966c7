"""Index of row borders: where a document goes on in another row, and the tokens around it.

    borders.links.npy      uint32 [borders, 2]: a row, and the row in which its document goes on
    borders.grams.npy      uint64 [7 borders]: hashes of the 8-grams across a border, ascending
    borders.sources.npy    uint32 [7 borders]: the border of each, times 8, plus its tokens before
    borders.json           hashes of the chunks and their provenance; written last

- A preparation cuts documents into rows and spreads these over the chunks. So a quotation of some
  hundred tokens is in several rows, and a suffix array of each chunk has only its parts.
- Which row goes on in which follows from the provenance: the document, and the offset in it.
- Rows count over all chunks, in the order of the manifest. 92 bytes a border.
- Held in memory while it is built, some 200 bytes a row: left out for data of more than MOST_ROWS.

Alternatives considered:
- Sorting the rows of a document one after another: they are in different chunks, and an index of a
  chunk is built without the others.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from k2train.data.chunk import open_chunk
from k2train.data.inspect.provenance import read_pieces
from k2train.data.manifest import ChunkInfo, Manifest
from k2train.data.npy import check_size, header_bytes, read_header
from k2train.errors import DataError
from k2train.files import AtomicFile, sha256_file
from k2train.retry import exists_retried, retried, stat_retried
from k2train.safe_json import parse_json, read_plain_file

FORMAT = "k2train-borders-1"
GRAM = 8
"""Tokens that are hashed: a span across a border that has fewer is not found."""
MOST_ROWS = 2**23
MAX_HEADER_BYTES = 2**22
BLOCK_ROWS = 2**16

Array = npt.NDArray[Any]
NAMES = ("links", "grams", "sources")
DTYPES = {"links": "<u4", "grams": "<u8", "sources": "<u4"}
_FACTORS = np.random.Generator(np.random.Philox(key=8)).integers(
    0, 2**64, GRAM, dtype=np.uint64
) | np.uint64(1)


@dataclass(frozen=True)
class Borders:
    """The open index."""

    links: Array
    grams: Array
    sources: Array

    def next(self, row: int) -> int | None:
        """Row in which the document at the end of a row goes on."""
        at = int(np.searchsorted(self.links[:, 0], row))
        found = at < len(self.links) and self.links[at, 0] == row
        return int(self.links[at, 1]) if found else None


def gram_hashes(windows: Array) -> Array:
    """Hash token windows `[n, 8]`: uint64 [n]. Equal hashes of different windows are possible."""
    mixed = windows.astype(np.uint64) + np.uint64(1)
    mixed = (mixed * _FACTORS).sum(axis=1, dtype=np.uint64)
    mixed ^= mixed >> np.uint64(29)
    return mixed * _FACTORS[0]


def facts_of(manifest: Manifest) -> list[list[str | None]]:
    """Return what the index depends on: hashes of each chunk and of its provenance."""
    return [[info.name, info.sha256, info.provenance_sha256] for info in manifest.all_chunks()]


def open_borders_index(
    manifest: Manifest, folder: Path, message: Callable[[str], None], check: bool = False
) -> Borders | str:
    """Open the index of borders, built if it is missing; a reason where there can be none."""
    chunks = manifest.all_chunks()
    if any(info.provenance is None for info in chunks):
        return "the data have no provenance: spans end with their row"
    if sum(info.rows for info in chunks) > MOST_ROWS:
        return f"the data have more than {MOST_ROWS:,} rows: spans end with their row"
    if manifest.sequence_length < GRAM:
        return f"rows are shorter than {GRAM} tokens: spans end with their row"

    found = _open(manifest, folder, check)
    if found is None:
        message(f"indexing the borders of {sum(info.rows for info in chunks):,} rows")
        _build(manifest, folder)
        found = _open(manifest, folder, check)
        assert found is not None, "it was written"
    return found


def border_bytes(folder: Path) -> int:
    """Bytes of the files."""
    paths = [folder / f"borders.{name}.npy" for name in NAMES]
    return sum(facts.st_size for path in paths if (facts := stat_retried(path)) is not None)


def _open(manifest: Manifest, folder: Path, check: bool) -> Borders | None:
    path = folder / "borders.json"
    if not exists_retried(path):
        return None
    try:
        header: Any = parse_json(read_plain_file(path, MAX_HEADER_BYTES))
        fits = header["format"] == FORMAT and header["chunks"] == facts_of(manifest)
        digests = [str(header["arrays"][name]) for name in NAMES] if fits else []
        found = [_map(folder, name) for name in NAMES] if fits else []
    except (ValueError, KeyError, TypeError, DataError):
        return None
    if not fits or (check and [_digest(array) for array in found] != digests):
        return None
    return Borders(*found)


def _map(folder: Path, name: str) -> Array:
    path, dtype = folder / f"borders.{name}.npy", np.dtype(DTYPES[name])
    found = read_header(path, str(path))
    count = int(np.prod(found.shape, dtype=np.int64))
    if found.dtype != dtype:
        raise DataError(f"{path}: is not of the index; delete it")
    check_size(found, found.offset + count * dtype.itemsize, str(path))
    if not count:
        return np.zeros(found.shape, dtype)
    return retried(
        lambda: np.memmap(path, dtype, mode="r", offset=found.offset, shape=found.shape), path
    )


def _digest(array: Array) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).data)


def _build(manifest: Manifest, folder: Path) -> None:
    links = _links(manifest)
    ends, begins = _edges(manifest)

    # Tokens before each border, then those behind it: seven of each make seven 8-grams.
    window = np.concatenate((ends[links[:, 0]], begins[links[:, 1]]), axis=1)
    hashes = [gram_hashes(window[:, at : at + GRAM]) for at in range(GRAM - 1)]
    sources = [
        np.arange(len(links), dtype=np.uint32) * GRAM + (GRAM - 1 - at) for at in range(GRAM - 1)
    ]
    grams, origin = np.concatenate(hashes), np.concatenate(sources)
    order = np.argsort(grams, kind="stable")

    arrays = {"links": links, "grams": grams[order], "sources": origin[order]}
    (folder / "borders.json").unlink(missing_ok=True)
    for name, array in arrays.items():
        values = np.ascontiguousarray(array, dtype=DTYPES[name])
        arrays[name] = values
        with AtomicFile(folder / f"borders.{name}.npy") as stream:
            stream.write(header_bytes(values.shape, values.dtype) + values.tobytes())
    header = {
        "format": FORMAT,
        "chunks": facts_of(manifest),
        "arrays": {name: _digest(array) for name, array in arrays.items()},
    }
    with AtomicFile(folder / "borders.json") as stream:
        stream.write((json.dumps(header) + "\n").encode())


def _links(manifest: Manifest) -> Array:
    """Pairs of rows, uint32 [borders, 2], ascending: the document of one goes on in the other."""
    heads: dict[int, int] = {}
    tails: list[tuple[int, int]] = []
    first = 0
    for info in manifest.all_chunks():
        for edge in _document_edges(manifest, info):
            if edge.is_tail:
                tails.append((edge.key, first + edge.row))
            else:
                heads[edge.key] = first + edge.row
        first += info.rows

    pairs = sorted((row, heads[key]) for key, row in tails if key in heads)
    return np.array(pairs, dtype=np.uint32).reshape(-1, 2)


@dataclass(frozen=True)
class _Edge:
    """Where a document is cut at the end (`is_tail`) or beginning of a row."""

    row: int
    key: int
    """Hash of the document and its token at the cut."""
    is_tail: bool


def _document_edges(manifest: Manifest, info: ChunkInfo) -> Iterator[_Edge]:
    path = manifest.folder / str(info.provenance)
    if info.provenance_sha256 != sha256_file(path):
        raise DataError(f"{path}: is not the file that {manifest.path} was written with")

    length = manifest.sequence_length
    columns = ("row", "start", "length", "subset", "source", "document", "offset", "repeat")
    table = read_pieces(
        manifest,
        [info],
        columns,
        lambda f: (f("start") == 0) | (f("start") + f("length") == length),
    )
    for piece in table.to_pylist():
        if (offset := piece.get("offset")) is None:
            continue
        named = [str(piece.get(key)) for key in ("subset", "source", "document", "repeat")]
        if piece["start"] == 0 and offset > 0:
            yield _Edge(piece["row"], _key(named, offset), False)
        if piece["start"] + piece["length"] == length:
            yield _Edge(piece["row"], _key(named, offset + piece["length"]), True)


def _key(named: list[str], offset: int) -> int:
    return xxhash.xxh3_64_intdigest("\0".join([*named, str(offset)]).encode())


def _edges(manifest: Manifest) -> tuple[Array, Array]:
    """Last and first seven ids of every row: two uint32 [rows, 7]."""
    ends, begins = [], []
    for info in manifest.all_chunks():
        chunk = open_chunk(manifest, info)
        for first in range(0, info.rows, BLOCK_ROWS):
            ids = chunk[first : first + BLOCK_ROWS].astype(np.uint32)
            ends.append(ids[:, 1 - GRAM :].copy())
            begins.append(ids[:, : GRAM - 1].copy())
        chunk.close()
    return np.concatenate(ends), np.concatenate(begins)
