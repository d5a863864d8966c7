"""Data folder manifest (`manifest.json`): reading, validating and writing it.

- The manifest names every chunk with its rows, tokens and hashes, and is written last.
- It comes from wherever the chunks came from, so every key is checked.
- No path in it may leave its folder.

Alternatives considered:
- Trusting it until the first batch fails: by then hundreds of devices have started.
"""

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, StrictBool

from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.json_record import Count, Number, Positive, Record, Text, Whole
from k2train.retry import is_folder_retried
from k2train.safe_json import parse_json, read_plain_file

FORMAT = "k2train-chunks-1"
MANIFEST_NAME = "manifest.json"
UINT16_VOCAB = 65536
MAX_MANIFEST_BYTES = 2**26
"""A hundred times the size of the manifest of K2's 360 chunks."""


class ChunkInfo(Record):
    """Manifest entry of one chunk; `tokens` is rows times sequence length.

    `borders` names the file of document boundaries, if the data was prepared with them.
    `provenance_content_sha256` is the hash of the provenance's columns, see `provenance_digest`.
    """

    name: Text
    file: Text
    rows: Positive
    tokens: Positive
    tokens_per_subset: dict[str, Count] = Field(default_factory=dict)
    sha256: Text
    provenance: Text | None = None
    provenance_sha256: Text | None = None
    provenance_content_sha256: Text | None = None
    borders: Text | None = None
    borders_sha256: Text | None = None


class Fact(Record):
    """Base of what a preparation may record besides: unknown keys are kept."""

    model_config = ConfigDict(extra="allow")


class TokenizerFacts(Fact):
    """The tokenizer's file in the data folder, and its control tokens in the order of their ids.

    `dummy_prefix` says what became of the space that the model puts in front of a text: `drop`,
    `keep`, or `as published` for imported ids; None for a model without, and in older folders.
    """

    file: str
    specials: tuple[str, ...]
    dummy_prefix: str | None = None

    @property
    def prefix(self) -> Literal["drop", "keep"]:
        """How the tokenizer is loaded, so that its hash is that of the manifest."""
        return "keep" if self.dummy_prefix == "keep" else "drop"


class TextFacts(Fact):
    """The record of the texts that a data folder was made of, see `text_record`."""

    file: str
    sha256: str
    count: Whole


class SubsetFacts(Fact):
    """A subset of a recorded recipe: the keys that are read again."""

    repeat: Number = 1
    limit_tokens: Whole | None = None
    fill: StrictBool = False


class RecipeFacts(Fact):
    """A recorded recipe: the keys that are read again."""

    name: str | None = None
    seed: Whole | None = None
    sequence_length: Whole | None = None
    chunks: Whole | None = None
    rows_per_chunk: Whole | None = None
    subsets: dict[str, SubsetFacts] = Field(default_factory=dict)


class Facts(Fact):
    """What the preparation recorded of itself; older and imported folders lack some of it.

    - `account`: what became of each subset's documents and tokens.
    - `road`: version of the preparation's code.
    - `document_keys`: see `data.document_keys`.
    - `texts`: see `data.text_record`; `seen`: hashes of these records of earlier folders, whose
      texts were left out.
    - `imported`: identity of an import of K2's files.
    """

    name: str | None = None
    imported: dict[str, Any] | None = None
    recipe_sha256: str | None = None
    recipe: RecipeFacts | None = None
    listing_sha256: str | None = None
    sources_sha256: str | None = None
    rejected_sha256: str | None = None
    tokenizer: TokenizerFacts | None = None
    texts: TextFacts | None = None
    seen: tuple[str, ...] = ()
    road: Whole | None = None
    python: str | None = None
    seed: Whole | None = None
    dropped_tail_tokens: dict[str, Whole] | None = None
    account: dict[str, dict[str, Number]] | None = None
    document_keys: dict[str, Any] | None = None


class Manifest(Record):
    """A data folder's manifest. `sha256` is that of manifest.json, so it names the whole folder.

    `content_sha256` names the data, whatever versions of Python and libraries wrote the folder;
    None for a folder without content hashes of its provenance. `path` and `sha256` are set by the
    reader.
    """

    path: Path
    sha256: str
    tokenizer_sha256: Text
    sequence_length: Positive
    vocab_size: Positive
    dtype: Text
    chunks: tuple[ChunkInfo, ...]
    held_out: ChunkInfo | None = None
    facts: Facts = Facts()

    @property
    def content_sha256(self) -> str | None:
        """Hash of what the folder means, see `content_sha256`; computed, so it cannot be wrong."""
        return content_sha256(self)

    def is_named(self, names: Collection[str | None]) -> bool:
        """Return whether one of these hashes, of the file or of the content, names this data."""
        known = {self.sha256, self.content_sha256} - {None}
        return not known.isdisjoint(names)

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


def content_sha256(manifest: Manifest) -> str | None:
    """Hash of what a data folder means: ids, borders, provenance, texts, recipe and tokenizer.

    None where the provenance of a chunk has no content hash.
    """
    chunks = manifest.all_chunks()
    if not chunks or any(info.provenance_content_sha256 is None for info in chunks):
        return None
    keys = ["name", "rows", "tokens_per_subset", "sha256", "borders_sha256"]
    keys.append("provenance_content_sha256")
    texts = manifest.facts.texts
    content = {
        "format": "k2train-content-1",
        "tokenizer": manifest.tokenizer_sha256,
        "sequence_length": manifest.sequence_length,
        "vocab_size": manifest.vocab_size,
        "chunks": [{key: getattr(info, key) for key in keys} for info in chunks],
        "held_out": manifest.held_out is not None,
        "texts": None if texts is None else texts.sha256,
        "recipe": manifest.facts.recipe_sha256,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def chunk_dtype(vocab_size: int) -> str:
    """Storage dtype of ids: `uint16` when every id below `vocab_size` fits, else `uint32`."""
    return "uint16" if vocab_size <= UINT16_VOCAB else "uint32"


def read_manifest(path: str | Path) -> Manifest:
    """Read and validate `manifest.json`; `path` is the file or its folder.

    Raises DataError when it is missing or not JSON, when keys are missing or mistyped, when a chunk
    is named twice, or when a file is outside the folder.
    """
    path = Path(path)
    path = path / MANIFEST_NAME if is_folder_retried(path) else path
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

    if (version := raw.get("format", FORMAT)) != FORMAT:
        raise DataError(f"{path}: format is {version!r}, this version reads {FORMAT!r}")

    digest = hashlib.sha256(content).hexdigest()
    try:
        manifest = Manifest.parse({**raw, "path": path, "sha256": digest})
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None

    _check_numbers(manifest)
    _check_names(manifest)
    return manifest


def _check_numbers(manifest: Manifest) -> None:
    """Compare what a manifest says twice on purpose: a hand-edited one shows here."""
    path, wanted = manifest.path, chunk_dtype(manifest.vocab_size)
    if manifest.dtype != wanted:
        raise DataError(
            f"{path}: dtype is {manifest.dtype!r}, vocab_size {manifest.vocab_size} needs "
            f"{wanted!r}"
        )
    if not manifest.chunks:
        raise DataError(f"{path}: key 'chunks' must be a list of at least one chunk")

    for i, info in enumerate(manifest.all_chunks()):
        where = f"{path}: chunks[{i}]" if i < len(manifest.chunks) else f"{path}: held_out"
        tokens = info.rows * manifest.sequence_length
        if info.tokens != tokens:
            raise DataError(
                f"{where}: tokens is {info.tokens}, {info.rows} rows of "
                f"{manifest.sequence_length} are {tokens}"
            )
        for key in ("provenance", "borders"):
            if getattr(info, key) is not None and getattr(info, f"{key}_sha256") is None:
                raise DataError(f"{where}: key '{key}_sha256' is missing")


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
        "chunks": [info.model_dump(exclude_none=True) for info in chunks],
        "held_out": held_out.model_dump(exclude_none=True) if held_out else None,
        "facts": facts or {},
    }

    with AtomicFile(folder / MANIFEST_NAME) as stream:
        stream.write((json.dumps(content, indent=1) + "\n").encode())
    return read_manifest(folder / MANIFEST_NAME)
