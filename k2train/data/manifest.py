"""Data folder manifest (`manifest.json`): reading, validating and writing it.

- The manifest names every chunk with its rows, tokens and hashes, and is written last.
- It comes from wherever the chunks came from, so every key is checked.
- No path in it may leave its folder.

Alternatives considered:
- Trusting it until the first batch fails: by then hundreds of devices have started.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2train.errors import DataError
from k2train.files import AtomicFile, sha256_file
from k2train.safe_json import parse_json, read_json, read_plain_file

FORMAT = "k2train-chunks-1"
MANIFEST_NAME = "manifest.json"
SOURCES_NAME = "sources.json"
UINT16_VOCAB = 65536
MAX_TEXT = 512
MAX_MANIFEST_BYTES = 2**26
"""A hundred times the size of the manifest of K2's 360 chunks."""


@dataclass(frozen=True)
class ChunkInfo:
    """Manifest entry of one chunk; `tokens` is rows times sequence length.

    `borders` names the file of document boundaries, if the data was prepared with them.
    """

    name: str
    file: str
    rows: int
    tokens: int
    tokens_per_subset: dict[str, int]
    sha256: str
    provenance: str | None = None
    provenance_sha256: str | None = None
    borders: str | None = None
    borders_sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A data folder's manifest. `sha256` is that of manifest.json, so it names the whole data set.

    `facts` holds what the preparation recorded besides: recipe hash, seed, dropped tail tokens.
    """

    path: Path
    sha256: str
    tokenizer_sha256: str
    sequence_length: int
    vocab_size: int
    dtype: str
    chunks: tuple[ChunkInfo, ...]
    held_out: ChunkInfo | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Directory of the manifest and its chunks."""
        return self.path.parent

    def chunk(self, name: str) -> ChunkInfo:
        """Return the chunk of that name, the held-out one included. Raises DataError."""
        for info in self.all_chunks():
            if info.name == name:
                return info
        raise DataError(
            f"{self.path}: no chunk is named {name!r}; there are "
            f"{short_list(c.name for c in self.chunks)}"
        )

    def all_chunks(self) -> tuple[ChunkInfo, ...]:
        """All chunks, the held-out one last."""
        return self.chunks + ((self.held_out,) if self.held_out else ())


def short_list(names: Iterable[str]) -> str:
    """Shorten a list of names to fit one line: `chunk_000 to chunk_359 (360)`."""
    listed = list(names)
    return ", ".join(listed) if len(listed) < 4 else f"{listed[0]} to {listed[-1]} ({len(listed)})"


def require_borders(manifest: Manifest, names: Iterable[str]) -> None:
    """Check that all named chunks have document boundaries (for `data.cross_documents: block`).

    Raises DataError.
    """
    without = [name for name in names if manifest.chunk(name).borders is None]
    if without:
        raise DataError(
            f"data.cross_documents is block, but these chunks of {manifest.path} have no document "
            f"borders: {short_list(without)}; set document_borders: true in the recipe and prepare "
            "the data again, or set data.cross_documents: attend"
        )


def chunk_dtype(vocab_size: int) -> str:
    """Storage dtype of ids: `uint16` when every id below `vocab_size` fits, else `uint32`."""
    return "uint16" if vocab_size <= UINT16_VOCAB else "uint32"


def read_manifest(path: str | Path) -> Manifest:
    """Read and validate `manifest.json`; `path` is the file or its folder.

    Raises DataError when it is missing or not JSON, when keys are missing or mistyped, when a chunk
    is named twice, or when a file is outside the folder.
    """
    path = Path(path)
    path = path / MANIFEST_NAME if path.is_dir() else path
    try:
        content = read_plain_file(path, MAX_MANIFEST_BYTES)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(
            f"data.manifest: {path} cannot be read ({why}); tools/prepare_data.py makes it"
        ) from None

    try:
        raw = parse_json(content)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); prepare the data again") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: must hold a JSON object, holds {type(raw).__name__}")

    manifest = _parse_manifest(path, raw, hashlib.sha256(content).hexdigest())
    _check_names(manifest)
    return manifest


def _parse_manifest(path: Path, raw: dict[str, Any], digest: str) -> Manifest:
    if (version := raw.get("format", FORMAT)) != FORMAT:
        raise DataError(f"{path}: format is {version!r}, this version reads {FORMAT!r}")

    where = str(path)
    vocab_size = _positive(raw, "vocab_size", where)
    dtype = _text(raw, "dtype", where)
    if dtype != chunk_dtype(vocab_size):
        raise DataError(
            f"{path}: dtype is {dtype!r}, vocab_size {vocab_size} needs {chunk_dtype(vocab_size)!r}"
        )

    sequence_length = _positive(raw, "sequence_length", where)
    entries = raw.get("chunks")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: key 'chunks' must be a list of at least one chunk")

    held_out = raw.get("held_out")
    facts = raw.get("facts", {})
    if not isinstance(facts, dict):
        raise DataError(f"{path}: key 'facts' must be an object")

    return Manifest(
        path=path,
        sha256=digest,
        tokenizer_sha256=_text(raw, "tokenizer_sha256", where),
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        dtype=dtype,
        chunks=tuple(
            _parse_chunk(e, f"{path}: chunks[{i}]", sequence_length) for i, e in enumerate(entries)
        ),
        held_out=_parse_chunk(held_out, f"{path}: held_out", sequence_length)
        if held_out is not None
        else None,
        facts=facts,
    )


def _parse_chunk(raw: Any, where: str, sequence_length: int) -> ChunkInfo:
    if not isinstance(raw, dict):
        raise DataError(f"{where}: must be an object, is {type(raw).__name__}")

    rows, tokens = _positive(raw, "rows", where), _positive(raw, "tokens", where)
    # Redundant on purpose: a hand-edited manifest shows here.
    if tokens != rows * sequence_length:
        raise DataError(
            f"{where}: tokens is {tokens}, {rows} rows of {sequence_length} are "
            f"{rows * sequence_length}"
        )

    subsets = raw.get("tokens_per_subset", {})
    if not isinstance(subsets, dict) or not all(_is_count(v) for v in subsets.values()):
        raise DataError(f"{where}: key 'tokens_per_subset' must map subsets to numbers of tokens")

    return ChunkInfo(
        name=_text(raw, "name", where),
        file=_text(raw, "file", where),
        rows=rows,
        tokens=tokens,
        tokens_per_subset=dict(subsets),
        sha256=_text(raw, "sha256", where),
        provenance=_text(raw, "provenance", where) if raw.get("provenance") is not None else None,
        provenance_sha256=_text(raw, "provenance_sha256", where)
        if raw.get("provenance") is not None
        else None,
        borders=_text(raw, "borders", where) if raw.get("borders") is not None else None,
        borders_sha256=_text(raw, "borders_sha256", where)
        if raw.get("borders") is not None
        else None,
    )


def _text(raw: Mapping[str, Any], key: str, where: str) -> str:
    value = raw.get(key)
    # Text that does not fit on one printed line would break every message that names it.
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or not value.isprintable():
        shown = "missing" if key not in raw else repr(value)[:60]
        raise DataError(f"{where}: key '{key}' must be text, is {shown}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive(raw: Mapping[str, Any], key: str, where: str) -> int:
    value = raw.get(key)
    if not _is_count(value) or value == 0:
        shown = "missing" if key not in raw else repr(value)[:60]
        raise DataError(f"{where}: key '{key}' must be a whole number above 0, is {shown}")
    return int(value)  # type: ignore[arg-type]


def _check_names(manifest: Manifest) -> None:
    # Two chunks with one file would be read twice as different data.
    seen: dict[str, str] = {}
    folder = manifest.folder.resolve()

    for info in manifest.all_chunks():
        for label, name in (("name", info.name), ("file", info.file), ("borders", info.borders)):
            if name is None:
                continue
            if (key := f"{label} {name}") in seen:
                raise DataError(f"{manifest.path}: chunk {label} {name!r} appears twice")
            seen[key] = info.name

        for file in filter(None, (info.file, info.provenance, info.borders)):
            # A manifest from elsewhere must not make us read, or later delete, a file outside.
            inside = not Path(file).is_absolute() and ".." not in Path(file).parts
            if not inside or not _is_inside(folder, file):
                raise DataError(
                    f"{manifest.path}: {info.name}: file {file!r} is outside the folder of the "
                    "manifest"
                )


def _is_inside(folder: Path, file: str) -> bool:
    try:
        return (folder / file).resolve().is_relative_to(folder)
    # A loop of links; which of the two is raised depends on the version of Python.
    except (OSError, RuntimeError):
        return False


@dataclass(frozen=True)
class SourceNames:
    """Source files of a data folder, the held-out ones included.

    `whole` are used whole; `shares` by their documents within a share of [0, 1]. `contents` are the
    hashes of those that recorded one.
    """

    whole: frozenset[str]
    shares: dict[str, tuple[float, float]]
    contents: dict[str, str]


def common_data(first: Manifest, second: Manifest) -> list[str]:
    """Describe the data that two folders share: equal chunks, and common source files if recorded.

    Empty when they are disjoint. A source shared by two stages would be seen twice. A file that is
    split inside is shared when its two shares overlap.
    """
    hashes = {info.sha256: info.name for info in first.all_chunks()}
    shared = [
        f"{hashes[i.sha256]} and {i.name}: same bytes"
        for i in second.all_chunks()
        if i.sha256 in hashes
    ]

    later, earlier = read_sources(second), read_sources(first)
    # A file used whole by one folder overlaps with any share of it.
    mixed = (earlier.whole & later.shares.keys()) | (earlier.shares.keys() & later.whole)
    for name in earlier.shares.keys() & later.shares.keys():
        (a, b), (c, d) = earlier.shares[name], later.shares[name]
        # The intervals [a, b) and [c, d) overlap.
        if max(a, c) < min(b, d):
            mixed |= {name}

    found = [f"source {name}" for name in sorted((earlier.whole & later.whole) | mixed)]
    # A file's shares are cut by its name, so equal content under another name is always shared.
    by_content = {digest: name for name, digest in earlier.contents.items()}
    same = [
        (by_content[d], name)
        for name, d in later.contents.items()
        if by_content.get(d, name) != name
    ]

    return (
        shared
        + found
        + [f"source {name} is {other} of the earlier data" for other, name in sorted(same)]
    )


def read_sources(manifest: Manifest) -> SourceNames:
    """Read the recorded sources of a data folder; none when it has no record.

    Raises DataError for a damaged record.
    """
    path = manifest.folder / SOURCES_NAME
    if "sources_sha256" not in manifest.facts:
        return SourceNames(frozenset(), {}, {})

    if not path.is_file() or sha256_file(path) != manifest.facts["sources_sha256"]:
        raise DataError(
            f"{path}: missing, or not the file {manifest.path} was written with; fetch it again"
        )

    try:
        return _parse_sources(read_json(path, MAX_MANIFEST_BYTES))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: is not a record of sources ({type(error).__name__}: {error}); fetch it again"
        ) from None


def _parse_sources(content: Any) -> SourceNames:
    shares = {
        name: (float(low), float(high)) for name, (low, high) in content.get("shares", {}).items()
    }

    whole = frozenset([*content["training"], *content["held_out"]])
    files = content.get("files", {})
    return SourceNames(
        whole,
        shares,
        {name: files[name]["sha256"] for name in files if name in whole or name in shares},
    )


def write_manifest(
    folder: Path,
    *,
    tokenizer_sha256: str,
    sequence_length: int,
    vocab_size: int,
    chunks: Iterable[ChunkInfo],
    held_out: ChunkInfo | None = None,
    facts: dict[str, Any] | None = None,
) -> Manifest:
    """Write `manifest.json` atomically and read it back.

    Call it last: the manifest is what makes a folder a data folder.
    """
    content = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer_sha256,
        "sequence_length": sequence_length,
        "vocab_size": vocab_size,
        "dtype": chunk_dtype(vocab_size),
        "chunks": [_entry(info) for info in chunks],
        "held_out": _entry(held_out) if held_out else None,
        "facts": facts or {},
    }

    with AtomicFile(folder / MANIFEST_NAME) as stream:
        stream.write((json.dumps(content, indent=1) + "\n").encode())
    return read_manifest(folder / MANIFEST_NAME)


def _entry(info: ChunkInfo) -> dict[str, Any]:
    return {key: value for key, value in vars(info).items() if value is not None}
