"""Checkpoint directories and manifests: layout on disk, format, search. No torch.

    ckpt_007/manifest.json   step, data position, layout, config, hashes of all other files
    ckpt_007/model/          weights by global name, safetensors shards with their offsets
    ckpt_007/optimizer/      fp32 `NAME.master`, `NAME.exp_avg`, `NAME.exp_avg_sq`
    ckpt_007/facts/          what each shard file holds, with hashes of its pieces (`side_files`)
    ckpt_007/thinned.json    marks a removed optimizer directory; names the manifest's hash

- `ckpt_NNN` has consumed NNN whole chunks of this stage. `ckpt_NNN_step_SSSSSS` was saved on
  request in between, or is the end of a stage whose last held-out loss is still to come. A
  directory named `*.tmp` was never finished and is never read.
- The manifest is written last. No file contains a pickle.
- The manifest also carries the hash of its own content (`self_sha256`). A changed digit would be
  valid JSON and would silently move the run to another step.
- Format 2 adds `state`, the root over the whole training state in any layout, and hashes of each
  tensor, taken from memory before writing. Damage is therefore named by tensor.
- Format 3 keeps the hashes of tensors in side files, one a shard file, and names those by hash. A
  rank reads the few it needs. Formats 1 and 2 are still read.
- A manifest is read once a start and process: one whose file did not change is kept in memory.
- Unknown keys are kept. The hash is that of the JSON as read, not of the parsed types.

Alternatives considered:
- A side file with the manifest's own hash: it can be lost or swapped.
- All facts in the manifest, as format 2: 47 MB for 480 ranks, which every rank reads, and each save
  keeps the other threads from running for seconds.
"""

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from k2train.checkpoint.manifest_types import (
    FACTS,
    FOLDERS,
    BlockFacts,
    CheckpointManifest,
    ChunkFacts,
    DataFacts,
    DataPosition,
    FileFacts,
    FileGroup,
    Json,
    LedgerFacts,
    PieceFacts,
    SaveFacts,
    ShardFacts,
    StateFacts,
    TensorFacts,
    TensorTable,
)
from k2train.errors import CheckpointError
from k2train.files import write_synced
from k2train.json_record import first_mistake
from k2train.retry import exists_retried, is_folder_retried, is_link_retried, list_retried
from k2train.safe_json import parse_json, read_plain_file
from k2train.state_digest import state_root

__all__ = [
    "FACTS",
    "FOLDERS",
    "FORMAT",
    "MANIFEST",
    "NAME",
    "THINNED",
    "BlockFacts",
    "CheckpointManifest",
    "ChunkFacts",
    "DataFacts",
    "DataPosition",
    "FileFacts",
    "FileGroup",
    "Json",
    "LedgerFacts",
    "PieceFacts",
    "SaveFacts",
    "ShardFacts",
    "StateFacts",
    "TensorFacts",
    "TensorTable",
    "check_marker",
    "checkpoint_name",
    "checkpoint_order",
    "is_thinned",
    "list_checkpoints",
    "manifest_sha256",
    "manifest_text",
    "mark_thinned",
    "read_manifest",
    "seal",
]

FORMAT = 3
NAME = re.compile(r"ckpt_(\d{3,})(?:_step_(\d{6,}))?")
MANIFEST = "manifest.json"
THINNED = "thinned.json"
SETTLED_SECONDS = 2.0
"""Age from which a file's times tell whether it was changed: file systems count in ticks."""
KNOWN_MANIFESTS = 4
"""Manifests that are kept in memory: those that a start looks at."""


def _set_fields(part: BaseModel) -> Json:
    # What a part does not say is not written as null: the hash is that of what is there.
    return part.model_dump(exclude_unset=True)


_dumps = partial(json.dumps, sort_keys=True, default=_set_fields)


def seal(content: Json) -> Json:
    """Add `self_sha256`, the hash of all other content, which `read_manifest` checks."""
    return {**content, "self_sha256": _content_sha256(content)}


def _content_sha256(content: Json) -> str:
    found = sha256()
    for text in _canonical({key: value for key, value in content.items() if key != "self_sha256"}):
        found.update(text.encode())
    return found.hexdigest()


def _canonical(content: Json, depth: int = 2) -> Iterator[str]:
    """Yield `_dumps(content, separators=(",", ":"))` in parts.

    One call for all of a large manifest would keep every other thread from running meanwhile.
    """
    yield "{"
    for number, key in enumerate(sorted(content)):
        value = content[key]
        yield f"{',' if number else ''}{json.dumps(key)}:"
        if depth > 1 and isinstance(value, dict) and set(map(type, value)) <= {str}:
            yield from _canonical(value, depth - 1)
        else:
            yield _dumps(value, separators=(",", ":"))
    yield "}"


def manifest_text(content: Json) -> str:
    """Format a manifest with one line per key.

    Full indentation of a large one takes five times as long.
    """
    lines = (f" {json.dumps(key)}: {_dumps(content[key])}" for key in sorted(content))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def checkpoint_name(chunks_consumed: int, step: int | None = None) -> str:
    """Name `ckpt_007`, or `ckpt_007_step_000123` for a save within a chunk at `step`."""
    return f"ckpt_{chunks_consumed:03d}" + ("" if step is None else f"_step_{step:06d}")


class _Known(NamedTuple):
    """A manifest that was read, and the sha256 of its file."""

    manifest: CheckpointManifest
    file_sha256: str


class _KnownManifests:
    """Manifests by the identity of their file, the last few of them; thread-safe."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], _Known] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, fresh: bool) -> _Known:
        identity = None if fresh else _identity(path / MANIFEST)
        with self._lock:
            if identity in self._known:
                # The one that was used last is the last to be forgotten.
                found = self._known[identity] = self._known.pop(identity)
                return found

        found = _read(path)
        if identity is not None and identity == _identity(path / MANIFEST):
            with self._lock:
                self._known[identity] = found
                while len(self._known) > KNOWN_MANIFESTS:
                    self._known.pop(next(iter(self._known)))
        return found


_known_manifests = _KnownManifests()


def _identity(file: Path) -> tuple[int, ...] | None:
    """Return what changes with a file's content; None when that is not certain."""
    try:
        facts = os.stat(file)
    except OSError:
        return None
    # Two writes within one tick of the file system's clock leave the same times.
    if time.time() - facts.st_ctime < SETTLED_SECONDS:
        return None
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def read_manifest(path: Path, fresh: bool = False) -> CheckpointManifest:
    """Read and validate the manifest of checkpoint directory `path`.

    A file that did not change since this process read it is not read again, unless `fresh`.
    Raises CheckpointError when it is missing, broken or of a newer format.
    """
    # A link under a new name would make an old state pass for a newer one.
    if NAME.fullmatch(path.name) and is_link_retried(path):
        raise CheckpointError(
            f"{path}: is a symbolic link; a checkpoint must be a real directory of its run"
        )

    manifest = _known_manifests.read(path, fresh).manifest
    if NAME.fullmatch(path.name) and manifest.name != path.name:
        raise CheckpointError(
            f"{path}: {MANIFEST} belongs to {ascii(manifest.name)[1:-1][:100]}; restore the "
            "directory's name"
        )
    return manifest


def manifest_sha256(path: Path) -> str:
    """Return the sha256 of the manifest file of checkpoint `path`, like `read_manifest`."""
    return _known_manifests.read(path, fresh=False).file_sha256


def _read(path: Path) -> _Known:
    try:
        text = read_plain_file(path / MANIFEST)
        content = parse_json(text)
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(
            f"{path / MANIFEST}: not valid JSON ({error}); it was changed or damaged"
        ) from None

    if not isinstance(content, dict):
        raise CheckpointError(f"{path / MANIFEST}: not a JSON object")

    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{path}: format {version} is newer than this code reads ({FORMAT}); update k2train"
        )
    if "self_sha256" in content and content["self_sha256"] != _content_sha256(content):
        raise CheckpointError(
            f"{path}: {MANIFEST} does not match its own hash; it was changed or damaged"
        )

    try:
        manifest = CheckpointManifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{path / MANIFEST}: {first_mistake(error)}") from None

    if (problem := _state_problem(manifest)) is not None:
        raise CheckpointError(f"{path / MANIFEST}: {problem}")
    return _Known(manifest, sha256(text).hexdigest())


def _state_problem(manifest: CheckpointManifest) -> str | None:
    """Return what contradicts the state's root, which covers digests, step and updates."""
    state = manifest.state
    if state is None:
        return None
    root = state_root(state.digests, manifest.step, manifest.adam_steps)
    if root == state.root:
        return None
    return (
        f"step {manifest.step}, adam_steps {manifest.adam_steps} and the digests have root "
        f"{root}, the manifest's is {state.root[:64]!a}; it was changed or damaged"
    )


def checkpoint_order(name: str) -> tuple[int, int]:
    """Return what sorts the names of checkpoints: chunks consumed, then the step within one."""
    match = NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoint directories under `directory`, oldest first.

    Sorted by chunks consumed, then by step.
    """
    if not is_folder_retried(directory):
        return []
    found = []
    for path in list_retried(directory):
        match = NAME.fullmatch(path.name)
        if match and is_folder_retried(path):
            found.append(((int(match[1]), int(match[2] or 0)), path))
    return [path for _, path in sorted(found)]


def is_thinned(path: Path) -> bool:
    """Whether the optimizer state was removed on purpose."""
    return exists_retried(path / THINNED)


def mark_thinned(path: Path, manifest: CheckpointManifest) -> None:
    """Mark the optimizer files of checkpoint `path` as removed. They may be deleted afterwards."""
    write_synced(path / THINNED, _marker(manifest))


def _marker(manifest: CheckpointManifest) -> str:
    return json.dumps({"removed": "optimizer", "manifest_self_sha256": manifest.self_sha256}) + "\n"


def check_marker(path: Path, manifest: CheckpointManifest) -> None:
    """Validate the thinning marker.

    A damaged directory can also show one, and would make a complete checkpoint lose its moments.
    """
    try:
        text = read_plain_file(path / THINNED, max_bytes=4096)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {THINNED} cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None

    # The second form was written before format 2.
    if text not in (_marker(manifest).encode(), b'{"removed": "optimizer"}\n'):
        raise CheckpointError(
            f"{path}: {THINNED} does not belong to this checkpoint; it was changed or damaged"
        )
