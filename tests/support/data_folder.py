"""Data folders made by hand: chunks of given ids, their provenance and borders, the manifest."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from pyarrow import parquet

from k2train.data.chunk import write_chunk
from k2train.data.document_boundaries import write_borders
from k2train.data.loss_mask import write_mask
from k2train.data.manifest import ChunkInfo, Manifest, read_manifest, write_manifest
from k2train.files import sha256_file

WORDS = arrow.dictionary(arrow.int32(), arrow.string())
KINDS = {
    **dict.fromkeys(("row", "start", "length"), arrow.int32()),
    **dict.fromkeys(("subset", "source", "fim"), WORDS),
    "document": arrow.string(),
    "offset": arrow.int64(),
    "repeat": arrow.int16(),
}
Columns = Mapping[str, Any]


def write_pieces(path: Path, pieces: Columns, group_rows: int = 50) -> str:
    """Write provenance as a preparation does; its hash."""
    table = {key: arrow.array(values).cast(KINDS[key]) for key, values in pieces.items()}
    parquet.write_table(arrow.table(table), path, compression="zstd", row_group_size=group_rows)
    return sha256_file(path)


def add_chunk(
    folder: Path,
    name: str,
    ids: Any,
    vocab: int,
    subsets: Mapping[str, int] | None = None,
    **beside: Any,
) -> ChunkInfo:
    """Write a chunk of ids [rows, length], with what lies beside it as `with_files` takes it."""
    blocks = [np.asarray(ids).astype(np.uint32)]
    info = write_chunk(folder, name, blocks, len(ids), vocab, dict(subsets or {}))
    return with_files(folder, info, **beside)


def with_files(
    folder: Path,
    info: ChunkInfo,
    pieces: Columns | None = None,
    borders: Iterable[int] | None = None,
    group_rows: int = 50,
    mask: Any = None,
) -> ChunkInfo:
    """The chunk with provenance, borders and loss mask written beside it."""
    files: dict[str, Any] = {}
    if pieces is not None:
        digest = write_pieces(folder / f"{info.name}.parquet", pieces, group_rows)
        files |= {"provenance": f"{info.name}.parquet", "provenance_sha256": digest}
    if borders is not None:
        digest = write_borders(folder / f"{info.name}.borders.npy", borders)
        files |= {"borders": f"{info.name}.borders.npy", "borders_sha256": digest}
    if mask is not None:
        name = f"{info.name}.mask.npy"
        digest, targets = write_mask(folder / name, [mask], info.rows)
        files |= {"loss_mask": name, "loss_mask_sha256": digest, "targets": targets}
    return info.model_copy(update=files)


def finish(
    folder: Path,
    infos: Sequence[ChunkInfo],
    length: int,
    vocab: int,
    tokenizer: str = "t" * 64,
    facts: dict[str, Any] | None = None,
) -> Manifest:
    """Write the manifest of a folder; a chunk named `held_out` is held out."""
    return write_manifest(
        folder,
        tokenizer_sha256=tokenizer,
        sequence_length=length,
        vocab_size=vocab,
        chunks=[info for info in infos if info.name != "held_out"],
        held_out=next((info for info in infos if info.name == "held_out"), None),
        facts=facts,
    )


def rewrite(folder: Path, **changes: Any) -> Manifest:
    """Write the manifest again, some of it changed."""
    here = read_manifest(folder / "manifest.json")
    kept = ("tokenizer_sha256", "sequence_length", "vocab_size", "chunks", "held_out")
    facts = {"facts": here.facts.model_dump(exclude_unset=True)}
    return write_manifest(folder, **({key: getattr(here, key) for key in kept} | facts | changes))


def edit(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> Manifest:
    """Change the JSON of a manifest and read it again."""
    return read_manifest(edit_json(manifest, change))


def edit_json(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the JSON of a manifest, without a check."""
    content = json.loads(manifest.path.read_text())
    change(content)
    manifest.path.write_text(json.dumps(content))
    return manifest.path


def rehash(manifest: Manifest) -> Manifest:
    """Make the hashes agree with what lies there, as a faulty preparation would leave them."""

    def change(content: dict[str, Any]) -> None:
        for entry in filter(None, [*content["chunks"], content["held_out"]]):
            for key in ("file", "provenance", "borders", "loss_mask"):
                if key in entry:
                    digest = "sha256" if key == "file" else f"{key}_sha256"
                    entry[digest] = sha256_file(manifest.folder / entry[key])

    return edit(manifest, change)


def flip(path: Path, location: int = -7) -> None:
    """Flip a bit of the byte there."""
    content = bytearray(path.read_bytes())
    content[location] ^= 1
    path.write_bytes(content)


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every file of a folder by its name."""
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
