"""The data of a run in a release: manifest, order, provenance, and the rows of recorded steps.

- The manifest, the lists of sources and the provenance of every chunk are always there; the chunks
  themselves on request, since they are the text.
- Without them each released checkpoint still has the rows of the two steps after it: one array
  `[steps, sequences, sequence length]`, whose hash the ledger holds.
- `order.json` is the order of the chunks as the run read them: that of the config, after the
  deferrals of the ledger.

Alternatives considered:
- The order of the config alone: a chunk that was deferred would be in the wrong place.
"""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from k2train.checkpoint.manifest import MANIFEST
from k2train.config.schema import Config
from k2train.data.chunk import open_chunk
from k2train.data.loss_mask import learned_of_rows, masked_as_asked
from k2train.data.manifest import Manifest
from k2train.data.order import ChunkOrder, apply_events, make_order
from k2train.errors import UserError
from k2train.files import sha256_file
from k2train.record.events import Entry, deferrals_of, of_kind
from k2train.record.followed_events import CheckpointFollowed
from k2train.release.places import MANIFESTS, ORDER, copy_file, write_bytes
from k2train.release.private import Private
from k2train.release.run_copy import redacted_text
from k2train.release.sealed import digest
from k2train.release.stage import Stage
from k2train.retry import is_file_retried, list_retried
from k2train.safe_json import read_plain_file

LEARNED = ".learned.npy"
"""End of the name of the masks that say which tokens of the rows are learned."""


@dataclass
class CopiedData:
    """What was written of the data: names of redacted files with their old hash, and gaps."""

    originals: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    missing_chunks: list[str] = field(default_factory=list)


def copy_data(
    stage: Stage, place: Path, chunks: bool, private: Private, hashes: dict[str, str]
) -> CopiedData:
    """Write the data of a stage, with its chunks or without. Raises OSError, UserError."""
    done, manifest = CopiedData(), stage.data
    assert manifest is not None, "a stage without data has nothing to copy"
    arrays = {name for info in manifest.all_chunks() for name in _arrays(info)}
    provenance = {info.provenance for info in manifest.all_chunks() if info.provenance}
    texts = manifest.facts.texts

    # Before the manifest, which names their hashes.
    for path in list_retried(manifest.folder):
        if not is_file_retried(path) or path.suffix == ".tmp" or path == manifest.path:
            continue
        known = path.name in arrays or (texts is not None and path.name == texts.file)
        if path.suffix == ".json" and path.name != "tokenizer.json":
            _redacted(path, place, done, private, hashes)
        elif path.name in provenance or path.name.startswith("tokenizer."):
            copy_file(path, place / path.name)
        elif known and chunks:
            _copy_once(path, place / path.name)
    done.missing += sorted(name for name in provenance if not is_file_retried(place / name))
    done.missing_chunks += sorted(
        info.file for info in manifest.all_chunks() if not is_file_retried(place / info.file)
    )
    _redacted(manifest.path, place, done, private, hashes)
    return done


def _arrays(info: Any) -> list[str]:
    return [name for name in (info.file, info.borders, info.loss_mask) if name]


def _copy_once(path: Path, place: Path) -> None:
    """Copy a large file, unless the same one is there already."""
    if not is_file_retried(place) or sha256_file(place) != sha256_file(path):
        copy_file(path, place)


def _redacted(
    path: Path, place: Path, done: CopiedData, private: Private, hashes: dict[str, str]
) -> None:
    before = read_plain_file(path)
    after = redacted_text(path, before, private, hashes)
    write_bytes(place / path.name, after)
    if after != before:
        done.originals[path.name] = digest(before)
        hashes[digest(before)] = digest(after)


def order_of(config: Config, manifest: Manifest, entries: Iterable[Entry], name: str) -> ChunkOrder:
    """Return the order in which a run read its chunks. Raises DataError, RunError."""
    masked = masked_as_asked(manifest, config.data.loss_mask)
    order = make_order(
        masked, config.data.order, config.batch.global_sequences, config.data.sequence_length
    )
    return apply_events(order, list(entries), name)


def order_json(order: ChunkOrder, manifest: Manifest, entries: Iterable[Entry]) -> dict[str, Any]:
    """Return the content of `order.json`."""
    moved = [
        {"chunk": one.chunk, "step": one.step, "order_index": one.order_index}
        for entry in entries
        for one in deferrals_of(entry.event)
    ]
    return {
        "global_sequences": order.global_sequences,
        "chunks": [
            {
                "name": name,
                "sha256": manifest.chunk(name).sha256,
                "rows": order.rows[i],
                "first_step": order.first_step(i),
                "steps": order.steps_in(i),
                "dropped_rows": order.dropped_rows(i),
            }
            for i, name in enumerate(order.names)
        ],
        "deferrals": moved,
    }


def json_bytes(content: Any) -> bytes:
    """Encode a file of this project that people read, too."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def write_order(stage: Stage, place: Path) -> str:
    """Write `order.json`; returns why it could not be, "" when it was. Raises OSError."""
    if stage.view.config is None or stage.data is None:
        return "config or data manifest of the run are not there"
    try:
        order = order_of(stage.view.config, stage.data, stage.entries, stage.name)
    except UserError as error:
        return str(error)
    write_bytes(place / ORDER, json_bytes(order_json(order, stage.data, stage.entries)))
    return ""


def followed(entries: Iterable[Entry], checkpoint: str, sha256: str) -> CheckpointFollowed | None:
    """Return the last record of the steps after a checkpoint with this manifest."""
    found = [
        event
        for event in of_kind(entries, CheckpointFollowed)
        if event.checkpoint == checkpoint and event.manifest_sha256 == sha256
    ]
    return found[-1] if found else None


def write_following(stage: Stage, checkpoint: Path, place: Path) -> str:
    """Write the rows of the recorded steps after a checkpoint; returns why not, or "".

    Raises OSError.
    """
    event = followed(stage.entries, checkpoint.name, sha256_file(checkpoint / MANIFEST))
    if event is None:
        return "the run recorded no step after it"
    if stage.data is None:
        return "the data of the run are not there"
    try:
        rows, learned = _rows_of(stage.data, event)
    except UserError as error:
        return str(error)
    write_bytes(place / f"{checkpoint.name}.npy", array_bytes(rows))
    if learned is not None:
        write_bytes(place / f"{checkpoint.name}{LEARNED}", array_bytes(learned))
    return ""


def _rows_of(manifest: Manifest, event: CheckpointFollowed) -> tuple[Any, Any]:
    ids, masks = [], []
    for step in event.steps:
        info = manifest.chunk(step.chunk)
        tokens = open_chunk(manifest, info)
        try:
            ids.append(np.array(tokens[step.rows[0] : step.rows[1]]))
        finally:
            tokens.close()
        if manifest.has_masks:
            masks.append(learned_of_rows(manifest, info, range(*step.rows)))
    return np.stack(ids), np.stack(masks) if masks else None


def array_bytes(values: Any) -> bytes:
    """Encode an array as a `.npy` file."""
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    return stream.getvalue()


def manifest_place(run: Path, checkpoint: str) -> Path:
    """Return where a released run has the manifest of a checkpoint, with its states or without."""
    whole = run / "checkpoints" / checkpoint / MANIFEST
    return whole if is_file_retried(whole) else run / MANIFESTS / f"{checkpoint}.json"
