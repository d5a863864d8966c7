"""Hugging Face folders of a release: each exported and checked, or kept from an earlier start.

- A folder gets its name after its check. One that is there is kept when it was made of the same
  checkpoint and its files match its own record.

Alternatives considered:
- Exporting all of them again: a release of 140 checkpoints that was killed would begin anew.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k2train.errors import CheckpointError
from k2train.files import sha256_file, write_synced
from k2train.hf.checkpoint_source import CheckpointSource
from k2train.hf.export import ExportOptions, export
from k2train.hf.folder import RECORD
from k2train.hf.tokenizer_source import template_of, tokenizer_of
from k2train.release.places import RUN
from k2train.release.stage import Stage
from k2train.retry import exists_retried
from k2train.safe_json import read_json


def export_model(
    stage: Stage,
    path: Path,
    folder: Path,
    tokenizer: str | None,
    check: bool,
    log: Callable[[str], None],
) -> None:
    """Write a checkpoint of a stage as the Hugging Face folder `folder`, unless it is there.

    `tokenizer` is a file, a data folder, `none`, or None for that of the run's data. Raises
    CheckpointError, RunError, UnavailableError.
    """
    if exists_retried(folder):
        if _is_of(folder, path):
            return
        raise CheckpointError(f"{folder} is of another checkpoint; remove it and start again")
    source = CheckpointSource(path)
    given = tokenizer
    if given is None and stage.data is not None:
        given = str(stage.data.path)
    found = tokenizer_of(path, source.manifest, given)
    template = None if found is None else template_of(path, source.manifest, given)
    options = ExportOptions(check=check, chat_template=template)
    export(source, folder, found, options, log)


def _is_of(folder: Path, path: Path) -> bool:
    try:
        record = read_json(folder / RECORD)
        files = record["files"]
        wanted = sha256_file(path / "manifest.json")
        same = wanted in (record["manifest_sha256"], record.get("original_manifest_sha256"))
        return same and all(
            sha256_file(folder / name) == facts["sha256"] for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def tell_place(folder: Path, stage: str, name: str, hashes: dict[str, str]) -> None:
    """Let the record of an export name the checkpoint by its place in the release.

    The manifest's hash becomes that of the redacted one, where it was redacted. Raises OSError.
    """
    record: dict[str, Any] = read_json(folder / RECORD)
    original = record.get("original_manifest_sha256", record["manifest_sha256"])
    now = hashes.get(original, original)
    record |= {"checkpoint": f"{stage}/{RUN}/checkpoints/{name}", "manifest_sha256": now}
    if now != original:
        record["original_manifest_sha256"] = original
    write_synced(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
