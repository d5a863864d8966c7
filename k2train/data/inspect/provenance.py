"""Provenance queries: the parts of a chunk, the pieces of a row, the occurrences of a document.

- The Parquet file beside each chunk has one line per piece of each row.
- Only what a query needs is read: rows are found by row group statistics, documents by one filtered
  scan of a few columns.

Alternatives considered:
- An index of documents: larger than the provenance itself, and one more file to keep consistent.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from k2train.data.manifest import ChunkInfo, Manifest, short_list
from k2train.errors import DataError, UserError

try:
    import pyarrow as arrow
    from pyarrow import compute, dataset, parquet
except ImportError:
    arrow = compute = dataset = parquet = None

Facts = dict[str, Any]

ALWAYS = ("row", "start", "length", "subset", "source", "document")
LATER = ("offset", "fim", "repeat")
"""Columns that older or imported folders may lack; reported as None, which is not 0 or "none"."""
HINT_CHUNKS = 8
"""Number of chunks searched for similar names when a document is not found."""


def find_chunk(manifest: Manifest, wanted: str) -> ChunkInfo:
    """Find a chunk by number or name; `held_out` is one.

    Raises DataError that lists the chunks and the nearest name.
    """
    names = [info.name for info in manifest.all_chunks()]
    is_number = wanted.isascii() and wanted.isdigit()
    digits = [
        name
        for name in names
        if is_number and (end := re.search(r"(\d+)$", name)) and int(end[1]) == int(wanted)
    ]

    if wanted in names or digits:
        return manifest.chunk(wanted if wanted in names else digits[0])
    # Suggest a name for a typing error.
    near = _nearest(wanted, names)
    raise DataError(
        f"{manifest.path}: there is no chunk {wanted!r}; there are "
        f"{short_list(info.name for info in manifest.chunks)}"
        + (" and held_out" if manifest.held_out else "")
        + (f"; nearest is {near[0]}" if near else "")
    )


def _nearest(wanted: str, names: list[str]) -> list[str]:
    """The most similar name, if any; first one of the same number, as chunk_000 for chunk_0."""
    end = re.search(r"[0-9]+$", wanted)

    same = [
        name
        for name in names
        if end and (own := re.search(r"[0-9]+$", name)) and int(own[0]) == int(end[0])
    ]
    return difflib.get_close_matches(wanted, same, 1, 0.6) or difflib.get_close_matches(
        wanted, names, 1, 0.6
    )


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
    with _Provenance(manifest, info) as file:
        keys = [name for name in ("subset", "fim", "repeat") if name in file.names]
        table = file.read([*keys, "source", "length"]).unify_dictionaries()
        sources = len(compute.unique(table["source"]))
        groups = (
            table.group_by(keys).aggregate([("length", "sum"), ("length", "count")]).to_pylist()
        )

    parts = [
        {
            **{key: group.get(key) for key in ("subset", "fim", "repeat")},
            "pieces": group["length_count"],
            "tokens": group["length_sum"],
        }
        for group in groups
    ]

    # Sorted in the order of the recipe's subsets.
    names = list(info.tokens_per_subset)
    parts.sort(
        key=lambda part: (
            _subset_index(names, part["subset"]),
            str(part["subset"]),
            part["repeat"] or 0,
            str(part["fim"]),
        )
    )

    return {
        "form": "chunk",
        "manifest": str(manifest.path),
        "sequence_length": manifest.sequence_length,
        **vars(info),
        "held_out": info == manifest.held_out,
        "sources": sources,
        "parts": parts,
    }


def _subset_index(names: list[str], name: Any) -> int:
    return names.index(name) if name in names else len(names)


def pieces_of(manifest: Manifest, info: ChunkInfo, rows: range) -> dict[int, list[Facts]]:
    """Read the pieces of each row, in order, with positions and names as recorded.

    Raises DataError when the provenance is missing or damaged, or does not cover a row exactly.
    """
    check_rows(info, rows)
    with _Provenance(manifest, info) as file:
        table = file.read([name for name in (*ALWAYS, *LATER) if name in file.names], rows)
        row = table["row"]
        # Row groups are coarser than rows.
        keep = compute.and_(compute.greater_equal(row, rows.start), compute.less(row, rows.stop))
        found = table.filter(keep).to_pylist()

    pieces: dict[int, list[Facts]] = {row: [] for row in rows}
    for item in found:
        pieces[item["row"]].append(
            {name: item.get(name) for name in (*ALWAYS, *LATER) if name != "row"}
        )

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


class _Provenance:
    """Open provenance file of a chunk; any error in it is a DataError."""

    def __init__(self, manifest: Manifest, info: ChunkInfo) -> None:
        self.path = provenance_path(manifest, info)

    def __enter__(self) -> "_Provenance":
        try:
            self.file = parquet.ParquetFile(self.path)
        except (OSError, arrow.ArrowException) as error:
            raise _damaged(self.path, error) from None
        self.names = set(self.file.schema_arrow.names)
        _check_columns(self.path, self.names)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, columns: list[str], rows: range | None = None) -> Any:
        """Read columns of the row groups that may contain any of `rows`."""
        groups = list(range(self.file.metadata.num_row_groups))
        if rows is not None:
            groups = [group for group in groups if self._may_hold(group, rows)]
        try:
            return self.file.read_row_groups(groups, columns=columns)
        except (OSError, arrow.ArrowException) as error:
            raise _damaged(self.path, error) from None

    def _may_hold(self, group: int, rows: range) -> bool:
        index = self.file.schema_arrow.get_field_index("row")
        statistics = self.file.metadata.row_group(group).column(index).statistics
        # Without statistics the group must be read.
        if statistics is None or not statistics.has_min_max:
            return True
        return bool(statistics.max >= rows.start and statistics.min < rows.stop)


def _check_columns(path: Path, names: Collection[str]) -> None:
    if lacking := [name for name in ALWAYS if name not in names]:
        raise DataError(
            f"{path}: has no column {', '.join(lacking)}; it is not the provenance of a chunk"
        )


def provenance_path(manifest: Manifest, info: ChunkInfo) -> Path:
    """Path of a chunk's provenance.

    Raises UserError when pyarrow is missing, DataError when the file is.
    """
    if parquet is None:
        raise UserError("provenance is Parquet, which needs pyarrow: pip install 'k2train[data]'")
    if info.provenance is None:
        raise DataError(f"{manifest.path}: {info.name} has no provenance; it was prepared without")
    path = manifest.folder / info.provenance
    if not path.is_file():
        raise DataError(f"{path}: is missing; fetch it again or prepare the data anew")
    return path


def _damaged(path: Path, error: BaseException) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(
        f"{path}: cannot be read as Parquet ({reason[:160]}); fetch it again or prepare the data "
        "anew"
    )


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
    infos = [info for info in manifest.all_chunks() if chunks is None or info.name in chunks]
    files = {str(provenance_path(manifest, info)): info for info in infos}
    found = _scan(files, _condition(name, subset, source)) if files else []
    if not found:
        raise DataError(_not_found(manifest, name, subset, source))

    for item in found:
        item["held_out"] = manifest.held_out is not None and item["chunk"] == manifest.held_out.name

    order = {info.name: index for index, info in enumerate(manifest.all_chunks())}
    found.sort(
        key=lambda item: (
            *(str(item[key]) for key in ("subset", "source", "document")),
            item["repeat"] or 0,
            item["offset"] or 0,
            order[item["chunk"]],
            item["row"],
            item["start"],
        )
    )
    return found


def _condition(name: str, subset: str | None, source: str | None) -> Any:
    field = compute.field
    wanted = (field("document") == name) | (field("source") == name)
    # A source or document may contain colons itself, so every split is tried.
    for colon in re.finditer(":", name):
        parts = name[: colon.start()], name[colon.end() :]
        wanted |= (field("source") == parts[0]) & (field("document") == parts[1])
    for key, value in (("subset", subset), ("source", source)):
        if value is not None:
            wanted &= field(key) == value
    return wanted


def _scan(files: Mapping[str, ChunkInfo], condition: Any) -> list[Facts]:
    try:
        data = dataset.dataset(list(files), format="parquet")
        for fragment in data.get_fragments():
            # A column missing in one file would be read as null, and the document missed there.
            _check_columns(Path(fragment.path), fragment.physical_schema.names)
        # First the files with any match, then all columns of these: documents are in few chunks.
        names = data.scanner(columns=["__filename"], filter=condition).to_table()["__filename"]

        if holding := compute.unique(names).to_pylist():
            columns = [name for name in (*ALWAYS, *LATER) if name in data.schema.names]
            some = dataset.dataset(holding, format="parquet", schema=data.schema)
            items = (
                some.scanner(columns=[*columns, "__filename"], filter=condition)
                .to_table()
                .to_pylist()
            )
        else:
            items = []
    except (OSError, arrow.ArrowException) as error:
        for path in files:
            # The error does not always name the file: find it.
            try:
                parquet.ParquetFile(path).close()
            except (OSError, arrow.ArrowException) as reason:
                raise _damaged(Path(path), reason) from None
        raise _damaged(Path(next(iter(files))).parent, error) from None

    keys = (*ALWAYS, *LATER)
    return [
        {"chunk": files[item["__filename"]].name, **{key: item.get(key) for key in keys}}
        for item in items
    ]


def _not_found(manifest: Manifest, name: str, subset: str | None, source: str | None) -> str:
    known = {key for info in manifest.all_chunks() for key in info.tokens_per_subset}
    if subset is not None and known and subset not in known:
        return (
            f"{manifest.path}: there is no subset {subset!r}; there are {', '.join(sorted(known))}"
        )

    within = "".join(
        f" in {kind} {value}" for kind, value in (("subset", subset), ("source", source)) if value
    )

    infos = manifest.all_chunks()[:HINT_CHUNKS]
    names: set[str] = set()
    for info in infos:
        with _Provenance(manifest, info) as file:
            table = file.read(["source", "document"])
            for column in ("source", "document"):
                names.update(value for value in compute.unique(table[column]).to_pylist() if value)

    near = difflib.get_close_matches(name, sorted(names)[:20000], n=3, cutoff=0.6)
    # No similar name: names that contain it.
    near = near or [other for other in sorted(names) if name.lower() in other.lower()][:3]
    return f"{manifest.path}: no document or source is named {name!r}{within}" + (
        f"; similar names: {', '.join(near)}"
        if near
        else "; see the names in the provenance with --chunk 0 --row 0"
    )
