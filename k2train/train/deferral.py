"""Deferral of a chunk by hand: checked against the run's newest checkpoint, then in its ledger.

- The order of a run is that of its config and the deferrals in its ledger, so the next start
  follows without a changed config.
- Checked before anything is written: a chunk that has begun would move what was read.
- From an older checkpoint on request (`from`): the next start goes back there, since every later
  checkpoint has begun the chunk, and sets these aside.

Alternatives considered:
- Editing `data.order`: the config then says nothing of when and why, and a later start from an
  older config undoes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train.checkpoint.manifest import (
    CheckpointManifest,
    is_thinned,
    list_checkpoints,
    read_manifest,
)
from k2train.data.inspect.run_progress import RecordedCheckpoint
from k2train.data.inspect.run_usage import Run
from k2train.data.order import ChunkOrder
from k2train.errors import CheckpointError, RunError
from k2train.guard.crash_loop import STARTS
from k2train.record.events import ChunkDeferred, Entry, deferrals_of
from k2train.text import counted


@dataclass(frozen=True)
class Deferral:
    """A checked deferral: the event to write, the orders before and after it."""

    event: ChunkDeferred
    checkpoint: str
    """The checkpoint that the next start continues from."""
    before: ChunkOrder
    after: ChunkOrder


@dataclass(frozen=True)
class Wish:
    """What a person asks for: `to` is a position in the order, None its end.

    `from_checkpoint` names an older checkpoint by number or name.
    """

    chunk: str
    why: str
    expect: str | None = None
    to: int | None = None
    from_checkpoint: str | None = None


def recorded_checkpoint(manifest: CheckpointManifest) -> RecordedCheckpoint:
    """Return what a manifest says of the data, in the form of the inspection."""
    return RecordedCheckpoint(
        manifest.name,
        manifest.step,
        manifest.consumed_tokens,
        manifest.config,
        manifest.data.manifest_sha256,
        [(chunk.name, chunk.sha256) for chunk in manifest.chunks.order],
        manifest.data.content_sha256,
    )


def check_deferral(
    directory: Path, entries: list[Entry], wish: Wish, data: Path | None = None
) -> Deferral:
    """Return the deferral that `wish` asks for in a run.

    Raises RunError or CheckpointError when it does not fit.
    """
    newest = _checkpoint(directory, None)
    start = newest if wish.from_checkpoint is None else _checkpoint(directory, wish.from_checkpoint)
    order = Run(directory, entries, recorded_checkpoint(newest), None, data).order
    name = _chunk(wish.chunk, order.names)
    if (line := _deferred_by(entries, name)) is not None:
        raise RunError(f"{name} was deferred already, by line {line} of {directory}/ledger.jsonl")

    i, last = order.names.index(name), len(order.names) - 1
    begun = start.chunks.consumed + (start.chunks.step_in_chunk > 0)
    if i < begun:
        older = wish.from_checkpoint or start.name
        raise RunError(
            f"{name} (position {i} of the order) has begun at {older}, step {start.step}, where "
            f"{counted(begun, 'chunk')} ha{'s' if begun == 1 else 've'}; only a later one can be "
            f"deferred, or give up the steps since an older checkpoint: --from {i}"
        )

    if i == last:
        raise RunError(f"{name} is the last of the order already")
    to = last if wish.to is None else wish.to
    if not i < to <= last:
        raise RunError(
            f"{name} is at position {i} of the order; --to ({to}) must be from {i + 1} to {last}"
        )

    attempts = [entry.event.attempt for entry in entries if isinstance(entry.event, STARTS)]
    event = ChunkDeferred(
        attempt=max(attempts),
        chunk=name,
        step=start.step,
        order_index=to,
        why=wish.why,
        expect=wish.expect,
    )
    return Deferral(event, start.name, order, order.deferred(i, to))


def _chunk(wanted: str, names: Sequence[str]) -> str:
    """Return the name of a chunk given by name or number."""
    number = int(wanted) if wanted.isascii() and wanted.isdigit() else None
    name = wanted if number is None else f"chunk_{number:03d}"
    if name not in names:
        raise RunError(
            f"there is no {name} in the order of the run: it has {counted(len(names), 'chunk')}, "
            f"{names[0]} to {names[-1]}"
        )
    return name


def _checkpoint(directory: Path, wanted: str | None) -> CheckpointManifest:
    """Return the manifest of a checkpoint that the run can continue from; None: the newest."""
    folder = directory / "checkpoints"
    whole = [path for path in reversed(list_checkpoints(folder)) if not is_thinned(path)]
    if wanted is not None:
        name = f"ckpt_{int(wanted):03d}" if wanted.isascii() and wanted.isdigit() else wanted
        named = [path for path in whole if path.name == name]
        if not named:
            there = ", ".join(path.name for path in whole[:5]) or "none"
            raise CheckpointError(f"{folder} has no {name} to continue from; it has {there}")
        return read_manifest(named[0])

    for path in whole:
        try:
            return read_manifest(path)
        except CheckpointError:
            # The next start passes it over, too.
            continue
    raise RunError(f"{folder} has no checkpoint to continue from: set data.order in the config")


def _deferred_by(entries: Sequence[Entry], name: str) -> int | None:
    """Line of the ledger that deferred a chunk, from 1; None if there is none."""
    lines = (
        entry.seq + 1
        for entry in entries
        if any(moved.chunk == name for moved in deferrals_of(entry.event))
    )
    return next(lines, None)
