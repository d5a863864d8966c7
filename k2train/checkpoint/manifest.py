"""A checkpoint on disk, without torch: its manifest, how to find one, how to check one.

    ckpt_007/manifest.json      step, data position, layout, config, hashes of every other file; written last
    ckpt_007/model/             weights by global name, safetensors shards with their offsets
    ckpt_007/optimizer/         fp32 master weights and both moments, `NAME.master`, `NAME.exp_avg`, `NAME.exp_avg_sq`
    ckpt_007/thinned.json       only when the optimizer directory was removed to save space

`ckpt_NNN` has consumed NNN whole chunks of this stage; `ckpt_NNN_step_SSSSSS` is one saved on request in between. A
directory still named `*.tmp` was never finished and is never read. There is no pickle anywhere.

The manifest carries the hash of its own content too (`self_sha256`): a changed digit in it would be valid JSON, and
would silently move the run to another step. A sidecar file with the hash was refused: it can be lost or swapped.
"""

import json
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from k2train.errors import CheckpointError
from k2train.files import sha256_file

FORMAT = 1
NAME = re.compile(r"ckpt_(\d{3,})(?:_step_(\d{6,}))?")
MANIFEST = "manifest.json"
THINNED = "thinned.json"
_REQUIRED = {
    "format": int,
    "name": str,
    "step": int,
    "adam_steps": int,
    "consumed_tokens": int,
    "chunks": dict,
    "config": dict,
    "data": dict,
    "tensors": dict,
    "files": dict,
}


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with `self_sha256`, the hash of everything else in it, as `read_manifest` asks for."""
    return {**manifest, "self_sha256": _content_sha256(manifest)}


def _content_sha256(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "self_sha256"}
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def checkpoint_name(chunks_consumed: int, step: int | None = None) -> str:
    """`ckpt_007`, or `ckpt_007_step_000123` for one saved within a chunk at `step`."""
    return f"ckpt_{chunks_consumed:03d}" + ("" if step is None else f"_step_{step:06d}")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of checkpoint directory `path`. Raises CheckpointError when it is missing, broken or too new."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path / MANIFEST}: not valid text ({error.reason}); it was changed or damaged"
        ) from None
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST}: not valid JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path / MANIFEST}: not a JSON object")
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{path / MANIFEST}: {key} is missing or not a {kind.__name__}")
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest['format']} is newer than this code reads ({FORMAT}); update k2train"
        )
    if manifest.get("self_sha256") != _content_sha256(manifest):
        raise CheckpointError(f"{path}: {MANIFEST} does not have its own hash; it was changed or damaged")
    if NAME.fullmatch(path.name) and manifest["name"] != path.name:
        raise CheckpointError(f"{path}: {MANIFEST} is that of {manifest['name']}; give the directory its name back")
    return manifest


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoint directories under `directory`, oldest first (by chunks consumed, then step)."""
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        match = NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(((int(match[1]), int(match[2] or 0)), path))
    return [path for _, path in sorted(found)]


def is_thinned(path: Path) -> bool:
    """Whether the optimizer state was removed on purpose."""
    return (path / THINNED).exists()


def expected_files(path: Path, manifest: dict[str, Any]) -> list[str]:
    """Files that must be there, in order; a thinned checkpoint needs no optimizer files.

    Raises CheckpointError for a shard that is there and not in the manifest: a reader would take its tensors too.
    """
    for folder in ("model", "optimizer"):
        for file in sorted((path / folder).glob("*")):
            if f"{folder}/{file.name}" not in manifest["files"]:
                raise CheckpointError(f"{path}: {folder}/{file.name} is not in the manifest; remove it")
    skip = is_thinned(path)
    return sorted(name for name in manifest["files"] if not (skip and name.startswith("optimizer/")))


def verify_files(path: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Check size and sha256 of `names`. Raises CheckpointError naming the first file that differs."""
    for name in names:
        file, facts = path / name, manifest["files"][name]
        if not file.resolve().is_relative_to(path.resolve()):
            raise CheckpointError(f"{path}: the manifest names {name}, outside the checkpoint")
        try:
            size = file.stat().st_size
        except OSError:
            raise CheckpointError(f"{path}: {name} is missing") from None
        if size != facts["bytes"]:
            raise CheckpointError(f"{path}: {name} has {size} bytes, the manifest says {facts['bytes']}")
        if sha256_file(file) != facts["sha256"]:
            raise CheckpointError(f"{path}: {name} does not have the hash of the manifest; it was changed or damaged")


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check a whole checkpoint: manifest, every file, no stray shard. Returns the manifest, raises CheckpointError."""
    manifest = read_manifest(path)
    verify_files(path, manifest, expected_files(path, manifest))
    return manifest
