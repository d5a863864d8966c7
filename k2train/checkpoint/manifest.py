"""Checkpoint directories and manifests: layout on disk, search, verification. No torch.

    ckpt_007/manifest.json   step, data position, layout, config, hashes of all other files
    ckpt_007/model/          weights by global name, safetensors shards with their offsets
    ckpt_007/optimizer/      fp32 `NAME.master`, `NAME.exp_avg`, `NAME.exp_avg_sq`
    ckpt_007/thinned.json    marks a removed optimizer directory; names the manifest's hash

- `ckpt_NNN` has consumed NNN whole chunks of this stage. `ckpt_NNN_step_SSSSSS` was saved on
  request in between. A directory named `*.tmp` was never finished and is never read.
- The manifest is written last. No file contains a pickle.
- The manifest also carries the hash of its own content (`self_sha256`). A changed digit would be
  valid JSON and would silently move the run to another step.
- Format 2 adds `shards`: for every file, the hash of its header and of each tensor, taken from
  memory before writing. Damage is therefore named by tensor.
- Format 2 also adds `state`, the root over the whole training state in any layout. Format 1 is
  still read.

Alternatives considered:
- A sidecar file with the manifest's hash: it can be lost or swapped.
"""

import json
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from k2train.checkpoint.shards import THREADS, first_problem
from k2train.errors import CheckpointError
from k2train.files import write_synced
from k2train.safe_json import read_json, read_plain_file

FORMAT = 2
NAME = re.compile(r"ckpt_(\d{3,})(?:_step_(\d{6,}))?")
MANIFEST = "manifest.json"
THINNED = "thinned.json"
FOLDERS = ("model", "optimizer")
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
_COUNTS = ("format", "step", "adam_steps", "consumed_tokens")


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Add `self_sha256`, the hash of all other content, which `read_manifest` checks."""
    return {**manifest, "self_sha256": _content_sha256(manifest)}


def _content_sha256(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "self_sha256"}
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Format a manifest with one line per key.

    Full indentation of a large one takes five times as long.
    """
    lines = (
        f" {json.dumps(key)}: {json.dumps(manifest[key], sort_keys=True)}"
        for key in sorted(manifest)
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def checkpoint_name(chunks_consumed: int, step: int | None = None) -> str:
    """Name `ckpt_007`, or `ckpt_007_step_000123` for a save within a chunk at `step`."""
    return f"ckpt_{chunks_consumed:03d}" + ("" if step is None else f"_step_{step:06d}")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and validate the manifest of checkpoint directory `path`.

    Raises CheckpointError when it is missing, broken or of a newer format.
    """
    # A link under a new name would make an old state pass for a newer one.
    if NAME.fullmatch(path.name) and path.is_symlink():
        raise CheckpointError(
            f"{path}: is a symbolic link; a checkpoint must be a real directory of its run"
        )

    try:
        manifest = read_json(path / MANIFEST)
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(
            f"{path / MANIFEST}: not valid JSON ({error}); it was changed or damaged"
        ) from None

    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path / MANIFEST}: not a JSON object")

    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{path / MANIFEST}: {key} is missing or not a {kind.__name__}")

    for key in _COUNTS:
        # JSON booleans pass for integers in Python.
        if isinstance(manifest[key], bool) or manifest[key] < 0:
            raise CheckpointError(
                f"{path / MANIFEST}: {key} is {manifest[key]}, must be a non-negative integer"
            )

    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest['format']} is newer than this code reads ({FORMAT}); update "
            "k2train"
        )
    if manifest.get("self_sha256") != _content_sha256(manifest):
        raise CheckpointError(
            f"{path}: {MANIFEST} does not match its own hash; it was changed or damaged"
        )
    if NAME.fullmatch(path.name) and manifest["name"] != path.name:
        raise CheckpointError(
            f"{path}: {MANIFEST} belongs to {manifest['name']}; restore the directory's name"
        )

    _check_names(path, manifest)
    return manifest


def _check_names(path: Path, manifest: dict[str, Any]) -> None:
    """Require that all named files are in the two folders.

    From format 2 on, every file must also list its tensors.
    """
    for name, facts in manifest["files"].items():
        parts = PurePosixPath(name).parts
        # Names come from the file: no path may lead out of the checkpoint.
        if (
            not name.isprintable()
            or len(parts) != 2
            or parts[0] not in FOLDERS
            or ".." in parts
            or "\0" in name
            or name != "/".join(parts)
        ):
            raise CheckpointError(
                f"{path}: the manifest names {name[:100]!r}, outside the checkpoint's folders"
            )

        if (
            not isinstance(facts, dict)
            or not isinstance(facts.get("bytes"), int)
            or "sha256" not in facts
        ):
            raise CheckpointError(f"{path}: the manifest lacks bytes and sha256 of {name}")

    for part, tensors in manifest["tensors"].items():
        known = tensors.values() if isinstance(tensors, dict) else [None]
        if not all(
            isinstance(facts, dict) and isinstance(facts.get("shape"), list) for facts in known
        ):
            raise CheckpointError(
                f"{path}: the manifest lacks the shape of a tensor in {part[:100]!r}"
            )

    # Format 1 describes files only as a whole.
    if manifest["format"] == 1:
        return

    shards = manifest.get("shards")
    if not isinstance(shards, dict) or set(shards) != set(manifest["files"]):
        raise CheckpointError(f"{path}: the manifest's shards are not its files")

    for name, shard in shards.items():
        if (
            not isinstance(shard, dict)
            or "header_sha256" not in shard
            or not isinstance(shard.get("tensors"), dict)
        ):
            raise CheckpointError(f"{path}: the manifest lacks header_sha256 and tensors of {name}")

        for tensor, facts in shard["tensors"].items():
            if not isinstance(facts, dict) or not {"offsets", "shape", "sha256"} <= set(facts):
                raise CheckpointError(
                    f"{path}: the manifest lacks offsets, shape or sha256 of {tensor}"
                )


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoint directories under `directory`, oldest first.

    Sorted by chunks consumed, then by step.
    """
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


def mark_thinned(path: Path, manifest: Mapping[str, Any]) -> None:
    """Mark the optimizer files of checkpoint `path` as removed. They may be deleted afterwards."""
    write_synced(path / THINNED, _marker(manifest))


def _marker(manifest: Mapping[str, Any]) -> str:
    return (
        json.dumps({"removed": "optimizer", "manifest_self_sha256": manifest["self_sha256"]}) + "\n"
    )


def _check_marker(path: Path, manifest: Mapping[str, Any]) -> None:
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


def expected_files(path: Path, manifest: dict[str, Any]) -> list[str]:
    """Names of the files that must exist, sorted. A thinned checkpoint needs no optimizer files.

    Raises CheckpointError for a shard that exists but is not in the manifest, since a reader would
    load its tensors too, and for a damaged marker.
    """
    for folder in FOLDERS:
        for file in sorted((path / folder).glob("*")):
            # A stray shard would be read by any reader that lists the folder.
            if f"{folder}/{file.name}" not in manifest["files"]:
                raise CheckpointError(
                    f"{path}: {folder}/{file.name} is not in the manifest; remove it"
                )

    skip = is_thinned(path)
    if skip:
        _check_marker(path, manifest)
    return sorted(
        name for name in manifest["files"] if not (skip and name.startswith("optimizer/"))
    )


def verify_files(
    path: Path, manifest: dict[str, Any], names: Iterable[str], threads: int = THREADS
) -> None:
    """Check size, header and every tensor of `names` in several threads.

    Raises CheckpointError naming the first file and tensor that differ.
    """
    names = list(names)
    root = path.resolve()
    for name in names:
        # A link inside the checkpoint could point out of it.
        if not (path / name).resolve().is_relative_to(root):
            raise CheckpointError(f"{path}: the manifest names {name}, outside the checkpoint")
    problem = first_problem(path, manifest["files"], manifest.get("shards", {}), names, threads)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")


def verify_checkpoint(path: Path, threads: int = THREADS) -> dict[str, Any]:
    """Verify a whole checkpoint: manifest, every file, no stray shard. Returns the manifest.

    Raises CheckpointError.
    """
    manifest = read_manifest(path)
    verify_files(path, manifest, expected_files(path, manifest), threads)
    return manifest
