"""Provenance queries: the parts of a chunk, the pieces of a row, the occurrences of a document.

- The Parquet file beside each chunk has one line per piece of each row.
- Only what a query needs is read: rows are found by row group statistics, documents by one filtered
  scan of a few columns.

Alternatives considered:
- An index of documents: larger than the provenance itself, and one more file to keep consistent.
"""

import difflib
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from k2train.data.manifest import ChunkInfo, Manifest, short_list
from k2train.errors import DataError, UserError
from k2train.files import sha256_file
from k2train.retry import is_file_retried, retried

Facts = dict[str, Any]
Condition = Callable[[Callable[[str], Any]], Any]
"""Makes a filter of pyarrow from its function `field`."""

ALWAYS = ("row", "start", "length", "subset", "source", "document")
LATER = ("offset", "fim", "repeat")
"""Columns that older or imported folders may lack; reported as None, which is not 0 or "none"."""
FILE = "__filename"
"""The column in which pyarrow gives the file of a line."""
SEVERAL = "several subsets"
"""In place of a subset's name, for a row that holds pieces of more than one."""
HINT_CHUNKS = 8
"""Number of chunks searched for similar names when a document is not found."""


# Chunks


def find_chunk(manifest: Manifest, wanted: str) -> ChunkInfo:
    """Find a chunk by number or name; `held_out` is one.

    Raises DataError that lists the chunks and the nearest name.
    """
    names = [info.name for info in manifest.all_chunks()]
    if wanted.isascii() and wanted.isdigit() and wanted not in names:
        wanted = next((name for name in names if _number(name) == int(wanted)), wanted)
    if wanted in names:
        return manifest.chunk(wanted)

    near = _nearest(wanted, names)
    raise DataError(
        f"{manifest.path}: there is no chunk {wanted!r}; there are "
        f"{short_list(info.name for info in manifest.chunks)}"
        + (" and held_out" if manifest.held_out else "")
        + (f"; nearest is {near[0]}" if near else "")
    )


def _number(name: str) -> int | None:
    """Number at the end of a chunk's name."""
    end = re.search(r"[0-9]+$", name)
    return int(end[0]) if end else None


def _nearest(wanted: str, names: list[str]) -> list[str]:
    """The most similar name, if any; first one of the same number, as chunk_000 for chunk_0."""
    number = _number(wanted)
    same = [name for name in names if number is not None and _number(name) == number]
    return difflib.get_close_matches(wanted, same, 1) or difflib.get_close_matches(wanted, names, 1)


def check_rows(info: ChunkInfo, rows: range) -> range:
    """Return `rows` if the chunk has them all. Raises DataError naming the rows it has."""
    if not rows or rows.start < 0 or rows.stop > info.rows:
        asked = f"row {rows.start}" if len(rows) == 1 else f"rows {rows.start} to {rows.stop - 1}"
        raise DataError(f"{info.name} has no {asked}: it has rows 0 to {info.rows - 1}")

    return rows


def chunk_facts(manifest: Manifest, info: ChunkInfo) -> Facts:
    """Size and hashes of a chunk, and its pieces by subset, fill-in-the-middle kind and repeat.

    Raises DataError.
    """
    table = read_pieces(manifest, [info], ("subset", "fim", "repeat", "source", "length"))
    keys = [name for name in ("subset", "fim", "repeat") if name in table.column_names]
    groups = table.group_by(keys).aggregate([("length", "sum"), ("length", "count")]).to_pylist()
    parts = [
        {
            **{key: group.get(key) for key in ("subset", "fim", "repeat")},
            "pieces": group["length_count"],
            "tokens": group["length_sum"],
        }
        for group in groups
    ]

    # In the order of the recipe's subsets.
    order = {name: index for index, name in enumerate(info.tokens_per_subset)}
    parts.sort(
        key=lambda part: (
            order.get(part["subset"], len(order)),
            str(part["subset"]),
            part["repeat"] or 0,
            str(part["fim"]),
        )
    )

    return {
        "form": "chunk",
        "manifest": str(manifest.path),
        "sequence_length": manifest.sequence_length,
        **info.model_dump(),
        "held_out": info == manifest.held_out,
        "sources": len(table["source"].unique()),
        "parts": parts,
    }


def pieces_of(manifest: Manifest, info: ChunkInfo, rows: Collection[int]) -> dict[int, list[Facts]]:
    """Read the pieces of each row, in order, with positions and names as recorded.

    Raises DataError when the provenance is missing or damaged, or does not cover a row exactly.
    """
    within = rows if isinstance(rows, range) else range(min(rows), max(rows) + 1)
    check_rows(info, within)

    def condition(field: Callable[[str], Any]) -> Any:
        # The range is what row group statistics are compared with.
        inside = (field("row") >= within.start) & (field("row") < within.stop)
        return inside if within is rows else inside & field("row").isin(list(rows))

    table = read_pieces(manifest, [info], (*ALWAYS, *LATER), condition)
    pieces: dict[int, list[Facts]] = {row: [] for row in rows}
    for item in table.to_pylist():
        piece = {name: item.get(name) for name in (*ALWAYS, *LATER)}
        pieces[piece.pop("row")].append(piece)

    for row, listed in pieces.items():
        # Pieces must follow each other without a gap or an overlap.
        listed.sort(key=lambda piece: piece["start"])
        position = 0
        for piece in listed:
            if piece["start"] != position:
                break
            position += piece["length"]
        if position != manifest.sequence_length or not listed:
            raise DataError(
                f"{manifest.folder / str(info.provenance)}: row {row} covers {position} of its "
                f"{manifest.sequence_length} positions; fetch the file again or prepare the data "
                "anew"
            )
    return pieces


# Files


def subset_of_rows(
    manifest: Manifest, info: ChunkInfo, rows: int, progress: Callable[[], None] | None = None
) -> list[str]:
    """Return the subset of each of the first `rows` rows of a chunk; `progress` as it is hashed.

    A row with pieces of several subsets is of `SEVERAL`. Raises DataError when the provenance is
    missing or damaged, or does not cover the rows, UserError when pyarrow is missing,
    UnavailableError or OSError when it cannot be read.
    """
    if len(info.tokens_per_subset) == 1:
        return list(info.tokens_per_subset) * rows

    path = _path(manifest, info)
    if info.provenance_sha256 != sha256_file(path, progress):
        raise DataError(f"{path}: is not the file that {manifest.path} was written with")
    table = read_pieces(manifest, [info], ("row", "subset"), lambda field: field("row") < rows)

    found: list[str | None] = [None] * rows
    for row, subset in zip(*(table[key].to_pylist() for key in ("row", "subset")), strict=True):
        found[row] = subset if found[row] in (None, subset) else SEVERAL
    missing = sum(name is None for name in found)
    if missing:
        raise DataError(f"{path}: knows nothing of {missing} of {rows} rows")
    return [str(name) for name in found]


def _path(manifest: Manifest, info: ChunkInfo) -> Path:
    if info.provenance is None:
        raise DataError(f"{manifest.path}: {info.name} has no provenance; it was prepared without")
    path = manifest.folder / info.provenance
    if not is_file_retried(path):
        raise DataError(f"{path}: is missing; fetch it again or prepare the data anew")
    return path


def read_pieces(
    manifest: Manifest,
    infos: Collection[ChunkInfo],
    columns: Collection[str],
    condition: Condition | None = None,
) -> Any:
    """Read columns of the chunks' provenance as one table; row groups are chosen by statistics.

    Columns that no file has are left out. Raises UserError when pyarrow is missing, DataError for
    any error in a file, UnavailableError for one that cannot be read for now.
    """
    # Imported here: it takes a third of the start, and the account needs no provenance.
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "provenance is Parquet, which needs pyarrow: pip install 'k2train[data]'"
        ) from None

    paths = [_path(manifest, info) for info in infos]
    try:
        return retried(lambda: _read_files(paths, columns, condition), manifest.folder)
    except (OSError, arrow.ArrowException) as error:
        damaged = (paths[0] if len(paths) == 1 else manifest.folder), error
        for path in paths:
            # The error does not always name the file: find it.
            try:
                parquet.ParquetFile(path).close()
            except (OSError, arrow.ArrowException) as found:
                damaged = path, found
                break

    where, reason = damaged[0], " ".join(str(damaged[1]).split())
    raise DataError(
        f"{where}: cannot be read as Parquet ({reason[:160]}); fetch it again or prepare the data "
        "anew"
    )


def _read_files(
    paths: Sequence[Path], columns: Collection[str], condition: Condition | None
) -> Any:
    """Read columns of Parquet files as one table. Raises DataError, OSError, pyarrow's errors."""
    from pyarrow import dataset

    data = dataset.dataset([str(path) for path in paths], format="parquet")
    for fragment in data.get_fragments():
        # A column missing in one file would be read as null, and the document missed there.
        names = fragment.physical_schema.names
        if lacking := [name for name in ALWAYS if name not in names]:
            raise DataError(
                f"{fragment.path}: has no column {', '.join(lacking)}; it is not the "
                "provenance of a chunk"
            )

    known = [name for name in columns if name in data.schema.names or name == FILE]
    chosen = condition(dataset.field) if condition else None
    return data.to_table(columns=known, filter=chosen).unify_dictionaries()


# Documents


def find_document(
    manifest: Manifest,
    name: str,
    subset: str | None = None,
    source: str | None = None,
    chunks: Collection[str] | None = None,
) -> list[Facts]:
    """Find every piece of every document that `name` matches, in reading order.

    `name` is a document, `source:document` or a source. `chunks` names those that can contain it,
    if known; otherwise all are scanned, the held-out one included. The result is sorted by subset,
    source, document, repeat and offset.
    Raises DataError when nothing matches, with the nearest names.
    """
    infos = {
        str(_path(manifest, info)): info
        for info in manifest.all_chunks()
        if chunks is None or info.name in chunks
    }
    order = {path: index for index, path in enumerate(infos)}
    condition = _condition(name, subset, source)

    items: list[Facts] = []
    # First the files with any match, then all columns of these: documents are in few chunks.
    if infos:
        found = read_pieces(manifest, infos.values(), [FILE], condition)[FILE].unique().to_pylist()
        if holding := [infos[path] for path in found]:
            items = read_pieces(manifest, holding, (*ALWAYS, *LATER, FILE), condition).to_pylist()
    if not items:
        raise DataError(_not_found(manifest, name, subset, source))

    items.sort(
        key=lambda item: (
            *(str(item[key]) for key in ("subset", "source", "document")),
            item.get("repeat") or 0,
            item.get("offset") or 0,
            order[item[FILE]],
            item["row"],
            item["start"],
        )
    )
    return [
        {
            "chunk": infos[item[FILE]].name,
            **{key: item.get(key) for key in (*ALWAYS, *LATER)},
            "held_out": infos[item[FILE]] == manifest.held_out,
        }
        for item in items
    ]


def _condition(name: str, subset: str | None, source: str | None) -> Condition:
    def condition(field: Callable[[str], Any]) -> Any:
        wanted = (field("document") == name) | (field("source") == name)
        # A source or document may contain colons itself, so every split is tried.
        for colon in re.finditer(":", name):
            parts = name[: colon.start()], name[colon.end() :]
            wanted |= (field("source") == parts[0]) & (field("document") == parts[1])
        for key, value in (("subset", subset), ("source", source)):
            if value is not None:
                wanted &= field(key) == value
        return wanted

    return condition


def _not_found(manifest: Manifest, name: str, subset: str | None, source: str | None) -> str:
    known = {key for info in manifest.all_chunks() for key in info.tokens_per_subset}
    if subset is not None and known and subset not in known:
        return (
            f"{manifest.path}: there is no subset {subset!r}; there are {', '.join(sorted(known))}"
        )

    within = "".join(
        f" in {kind} {value}" for kind, value in (("subset", subset), ("source", source)) if value
    )

    names: set[str] = set()
    for info in manifest.all_chunks()[:HINT_CHUNKS]:
        for column in read_pieces(manifest, [info], ("source", "document")).columns:
            names.update(value for value in column.unique().to_pylist() if value)

    near = difflib.get_close_matches(name, sorted(names)[:20000], n=3, cutoff=0.6)
    # No similar name: names that contain it.
    near = near or [other for other in sorted(names) if name.lower() in other.lower()][:3]
    return f"{manifest.path}: no document or source is named {name!r}{within}" + (
        f"; similar names: {', '.join(near)}"
        if near
        else "; see the names in the provenance with --chunk 0 --row 0"
    )
