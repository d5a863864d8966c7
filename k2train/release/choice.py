"""Choice of the checkpoints that a release holds, and the index of all that were ever saved.

- The ledger decides what was saved; the disk decides what can be released.
- A checkpoint that is not released has a line with its reason.

Alternatives considered:
- Listing the folder: what was removed or set aside would leave no trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.checkpoint import selection
from k2train.checkpoint.manifest import (
    MANIFEST,
    checkpoint_order,
    is_thinned,
    list_checkpoints,
    read_manifest,
)
from k2train.checkpoint.retention import is_on_demand
from k2train.errors import CheckpointError, RunError
from k2train.files import sha256_file
from k2train.record.events import (
    CheckpointRemoved,
    CheckpointSaved,
    CheckpointsMerged,
    Entry,
    Resumed,
    of_kind,
)
from k2train.record.rollback_events import SpikeCheckpoint
from k2train.retry import is_folder_retried

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Wanted:
    """What was asked for: `names` as text, or every so many numbered checkpoints."""

    names: str | None = None
    every: int = 1
    states: bool = True


@dataclass(frozen=True)
class Line:
    """A checkpoint that was saved once: what the ledger says of it, and what became of it."""

    checkpoint: str
    kind: str
    """numbered, inside a chunk, beside a spike, merged."""
    step: int
    manifest_sha256: str
    consumed_tokens: int | None = None
    loss: float | None = None
    held_out_loss: float | None = None
    released: bool = False
    states: bool = False
    """Whether its optimizer states are released."""
    reason: str = ""
    """Why it is not released, or its states are not."""


def chosen(run: Path, wanted: Wanted) -> list[Path]:
    """Return the checkpoints to release, oldest first; numbered ones alone.

    `names` are words of `k2train.checkpoint.selection`; `newest` is the newest numbered one. With
    `every` the first and the newest are always among them. Raises RunError, CheckpointError.
    """
    numbered = [path for path in list_checkpoints(run / CHECKPOINTS) if not is_on_demand(path)]
    if not numbered:
        raise RunError(f"{run} has no numbered checkpoint; train to the end of a chunk first")
    if wanted.names == "newest":
        return numbered[-1:]
    if wanted.names is None:
        return [
            path
            for path in numbered
            if checkpoint_order(path.name)[0] % wanted.every == 0
            or path in (numbered[0], numbered[-1])
        ]

    found = selection.chosen(run, wanted.names)
    if inside := [path for path in found if is_on_demand(path)]:
        raise CheckpointError(
            f"--checkpoints: {inside[0].name} was saved inside a chunk; name numbered ones, from "
            f"{numbered[0].name} to {numbered[-1].name}"
        )
    return found


def index_of(
    run: Path, entries: Sequence[Entry], released: Sequence[Path], states: bool
) -> list[Line]:
    """Return a line for every checkpoint that the run ever saved, in the ledger's order."""
    names = {path.name: path for path in released}
    removed = {event.checkpoint: event.reason for event in of_kind(entries, CheckpointRemoved)}
    lines: dict[tuple[str, str], Line] = {}
    aside: dict[tuple[str, str], int] = {}
    for event in (entry.event for entry in entries):
        if isinstance(event, CheckpointSaved):
            key = (event.checkpoint, event.manifest_sha256)
            lines[key] = _saved(run, event, names, removed, states)
        elif isinstance(event, Resumed):
            gone = set(event.set_aside)
            aside |= {key: event.attempt for key in lines if key[0] in gone}
        elif isinstance(event, SpikeCheckpoint):
            lines[event.checkpoint, ""] = _beside_spike(run, event)
        elif isinstance(event, CheckpointsMerged):
            lines[event.checkpoint, ""] = Line(
                event.checkpoint,
                "merged",
                event.step,
                event.manifest_sha256,
                reason="a merge of others, which can be made again from them",
            )
    for key, attempt in aside.items():
        if not lines[key].released:
            text = f"set aside by attempt {attempt}, which did its steps again"
            lines[key] = Line(**{**vars(lines[key]), "reason": text})
    return list(lines.values())


def _saved(
    run: Path,
    event: CheckpointSaved,
    names: dict[str, Path],
    removed: dict[str, str],
    states: bool,
) -> Line:
    inside = checkpoint_order(event.checkpoint)[1] > 0
    path = names.get(event.checkpoint)
    # Another one may have come under its name since.
    out = path is not None and sha256_file(path / MANIFEST) == event.manifest_sha256
    kept = path is not None and out and states and not is_thinned(path)
    reason = ""
    if path is not None and out:
        if not kept:
            reason = "states thinned by the run" if states else "states left out (--no-states)"
    elif event.checkpoint in removed:
        reason = f"removed by the run: {removed[event.checkpoint]}"
    elif not is_folder_retried(run / CHECKPOINTS / event.checkpoint):
        reason = "no longer in the run's directory"
    else:
        reason = "saved inside a chunk" if inside else "not chosen for this release"
    return Line(
        event.checkpoint,
        "inside a chunk" if inside else "numbered",
        event.step,
        event.manifest_sha256,
        event.consumed_tokens,
        event.loss,
        event.held_out_loss,
        out,
        kept,
        reason,
    )


def _beside_spike(run: Path, event: SpikeCheckpoint) -> Line:
    path = run / event.checkpoint
    there = is_folder_retried(path)
    return Line(
        event.checkpoint,
        f"beside spike {event.number}: {event.kind}",
        event.step,
        event.manifest_sha256,
        consumed_tokens=read_manifest(path).consumed_tokens if there else None,
        released=there,
        states=there and not is_thinned(path),
        reason="" if there else "no longer in the run's directory",
    )
