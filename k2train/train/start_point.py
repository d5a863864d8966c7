"""Start point: the checkpoints that a run may continue from, best first.

- Decided by `run.resume` from the run directory alone, before torch is imported.
- A checkpoint that cannot be read is passed over, with the reason why.
"""

from collections.abc import Sequence
from pathlib import Path

from k2train.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    is_thinned,
    list_checkpoints,
    read_manifest,
)
from k2train.config.load import Config
from k2train.errors import CheckpointError, RunError
from k2train.record.events import Entry, Resumed, Started
from k2train.train.state import TrainState

CANDIDATES = 4
"""Checkpoints considered, newest first: reading the manifests of a large run takes time."""


def wanted_checkpoints(
    config: Config, directory: Path, entries: Sequence[Entry]
) -> tuple[list[Path], list[str]]:
    """Return the readable checkpoints, best first, and why others were refused.

    Returns none for a fresh start.
    """
    folder, resume = directory / "checkpoints", config.run.resume
    found = list_checkpoints(folder)
    if resume == "never":
        if found or (directory / "ledger.jsonl").exists():
            raise RunError(
                f"run.resume is never, but {directory} holds a run; "
                "choose another run.name or run.resume=auto"
            )
        return [], []

    if isinstance(resume, int) and not _already_resumed_from(entries, resume):
        named = [path for path in found if path.name == f"ckpt_{resume:03d}"]
        readable, refused = _readable(named)
        if not readable:
            others = ", ".join(path.name for path in found if path not in named) or "none"
            why = f"; refused: {refused[0]}" if refused else ""
            raise CheckpointError(
                f"run.resume asks for ckpt_{resume:03d}, {folder} has: {others}{why}"
            )
        return readable, refused

    # A thinned checkpoint holds weights only and cannot be resumed.
    whole = [path for path in reversed(found) if not is_thinned(path)]
    usable, refused = _readable(whole)
    if (not found and resume == "must") or (refused and not usable):
        why = f"; refused: {'; '.join(refused)}" if refused else ""
        raise CheckpointError(
            f"run.resume is {resume}, but there is no checkpoint to continue from in "
            f"{folder}{why}; choose another run.name to start anew"
        )

    if found and not usable:
        raise CheckpointError(
            f"{found[-1]} and all before it were thinned to their weights: "
            "they can start another run (run.init_from), not continue this one"
        )
    return usable, refused


def _readable(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the first `CANDIDATES` with a readable manifest, and the problems of those between."""
    readable: list[Path] = []
    refused: list[str] = []
    for path in paths:
        if len(readable) == CANDIDATES:
            break
        try:
            _check_resumable(path, read_manifest(path))
            readable.append(path)
        except CheckpointError as error:
            refused.append(str(error))
    return readable, refused


def _check_resumable(path: Path, manifest: CheckpointManifest) -> None:
    if manifest.identity is None:
        raise CheckpointError(
            f"{path / MANIFEST}: identity is missing, the run cannot continue from there"
        )
    try:
        TrainState.of(manifest)
    except CheckpointError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}") from None


def _already_resumed_from(entries: Sequence[Entry], number: int) -> bool:
    """Return whether the last start already resumed from this checkpoint number.

    The same command started again then continues the run, instead of going back once more.
    """
    events = [entry.event for entry in entries]
    starts = [event for event in events if isinstance(event, Started | Resumed)]
    return bool(starts) and isinstance(starts[-1], Resumed) and starts[-1].requested == number
