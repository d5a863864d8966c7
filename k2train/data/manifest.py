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
from typing import Any

from pydantic import Field

from k2train.commands import program_text
from k2train.data.manifest_facts import Facts
from k2train.errors import DataError
from k2train.files import AtomicFile
from k2train.json_record import Count, Positive, Record, Text
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
    `loss_mask` names the file that says which tokens are learned, `targets` their number.
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
    loss_mask: Text | None = None
    loss_mask_sha256: Text | None = None
    targets: Positive | None = None

    def files(self) -> list[str]:
        """Names of all files of the chunk."""
        return [f for f in (self.file, self.provenance, self.borders, self.loss_mask) if f]


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
    def has_masks(self) -> bool:
        """Whether its chunks have loss masks: all of them, or none."""
        return self.chunks[0].loss_mask is not None

    def without_masks(self) -> "Manifest":
        """Return the manifest as if its chunks had no loss masks."""
        gone = {"loss_mask": None, "loss_mask_sha256": None, "targets": None}
        held_out = self.held_out and self.held_out.model_copy(update=gone)
        chunks = tuple(info.model_copy(update=gone) for info in self.chunks)
        return self.model_copy(update={"chunks": chunks, "held_out": held_out})

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
    """Hash of what a data folder means: ids, borders, masks, provenance, texts, recipe, tokenizer.

    None where the provenance of a chunk has no content hash.
    """
    chunks = manifest.all_chunks()
    if not chunks or any(info.provenance_content_sha256 is None for info in chunks):
        return None
    keys = ["name", "rows", "tokens_per_subset", "sha256", "borders_sha256"]
    keys.append("provenance_content_sha256")
    texts = manifest.facts.texts
    masks = [info.loss_mask_sha256 for info in chunks]
    content = {
        "format": "k2train-content-1",
        "tokenizer": manifest.tokenizer_sha256,
        "sequence_length": manifest.sequence_length,
        "vocab_size": manifest.vocab_size,
        "chunks": [{key: getattr(info, key) for key in keys} for info in chunks],
        # Only where there are masks: the hash of other folders stays.
        **({"loss_masks": masks} if manifest.has_masks else {}),
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
            f"data.manifest: {path} cannot be read ({why}); {program_text('prepare_data')} makes it"
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
        for key in ("provenance", "borders", "loss_mask"):
            if getattr(info, key) is not None and getattr(info, f"{key}_sha256") is None:
                raise DataError(f"{where}: key '{key}_sha256' is missing")
    _check_masks(manifest)


def _check_masks(manifest: Manifest) -> None:
    """Check that all chunks have a loss mask, or none; and what the manifest says of each."""
    infos = manifest.all_chunks()
    without = [info.name for info in infos if info.loss_mask is None]
    if without and len(without) < len(infos):
        raise DataError(
            f"{manifest.path}: {len(infos) - len(without)} of {len(infos)} chunks have a loss "
            f"mask, these have none: {short_list(without)}; all must have one, the held-out chunk "
            "too, or none; prepare the data again"
        )
    for info in () if without else infos:
        most = info.rows * (manifest.sequence_length - 1)
        if info.targets is None or not info.rows <= info.targets <= most:
            raise DataError(
                f"{manifest.path}: {info.name}: targets is {info.targets}, with a loss mask "
                f"{info.rows} rows of {manifest.sequence_length} tokens have {info.rows} to {most}"
            )


def _check_names(manifest: Manifest) -> None:
    # Two chunks with one file would be read twice as different data.
    seen: dict[str, str] = {}
    folder = manifest.folder.resolve()

    for info in manifest.all_chunks():
        named = ("name", "file", "borders", "loss_mask")
        for label, name in ((label, getattr(info, label)) for label in named):
            if name is None:
                continue
            if (key := f"{label} {name}") in seen:
                raise DataError(f"{manifest.path}: chunk {label} {name!r} appears twice")
            seen[key] = info.name

        for file in info.files():
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
