"""Disk state between attempts: whole checkpoints, leftover files, and the values of the records.

- Everything is read with the library that verifies a run, never with the code that wrote it.
"""

import fcntl
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_tests.tiny_run import GLOBAL, TinyRun
from k2train.checkpoint.manifest import (
    CheckpointManifest,
    is_thinned,
    list_checkpoints,
    read_manifest,
)
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError
from k2train.record.metrics import StepRecord, latest, read_metrics

Values = tuple[Any, ...]


def root_of(manifest: CheckpointManifest) -> str:
    """Root of the whole state; for a checkpoint without one, the hash over its files' hashes."""
    if manifest.state is not None:
        return manifest.state.root
    lines = "\n".join(f"{name} {facts.sha256}" for name, facts in sorted(manifest.files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class Reference:
    """The undisturbed run that every other run must equal."""

    roots: dict[str, str]
    """Checkpoint name -> root of the state."""
    rows: dict[int, Values]
    """Step -> (chunk, rows, loss, gradient norm, rate, applied, root of the state where a row has
    it).
    """
    final: str
    step_seconds: float
    """Median of its steps."""


def values_of(row: StepRecord) -> Values:
    """The compared values of a row."""
    keys = ("chunk", "rows", "loss", "grad_norm", "lr", "applied", "state_root")
    return tuple(json.dumps(getattr(row, key)) for key in keys)


def reference_of(run: Path) -> Reference:
    """Read an undisturbed run. Raises CheckpointError when it is not whole."""
    paths = list_checkpoints(run / "checkpoints")
    roots = {path.name: root_of(verify_checkpoint(path)) for path in paths}
    rows = latest(run / "metrics.jsonl")
    seconds = sorted(row.seconds for row in rows)
    return Reference(
        roots,
        {row.step: values_of(row) for row in rows},
        paths[-1].name,
        seconds[len(seconds) // 2],
    )


@dataclass
class Disk:
    """Present checkpoints of a run."""

    whole: list[str]
    """Complete (weights and optimizer states) and verified byte for byte, oldest first."""
    problems: list[str]


def checkpoints_of(run: Path, reference: Reference, newest: int = 0) -> Disk:
    """Verify the `newest` checkpoints (0: all) and compare them with the reference.

    Thinned ones are skipped.
    """
    disk = Disk([], [])
    paths = [path for path in list_checkpoints(run / "checkpoints") if not is_thinned(path)]

    for path in paths[-newest:]:
        try:
            root = root_of(verify_checkpoint(path))
        except CheckpointError as error:
            disk.problems.append(f"not whole: {error}")
            continue
        disk.whole.append(path.name)
        wanted = reference.roots.get(path.name)
        if wanted is not None and wanted != root:
            disk.problems.append(
                f"{path.name} holds another state than the undisturbed run ({root[:12]}, not "
                f"{wanted[:12]})"
            )

    return disk


def row_problems(run: Path, reference: Reference, done: bool = False) -> list[str]:
    """Steps of any attempt with other values than the undisturbed run.

    With `done` also missing steps.

    A step that was not applied changed nothing; it counts only if no later attempt repeated it.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return [f"{path} is missing"] if done else []
    rows = read_metrics(path)
    found = []
    last = {row.step: index for index, row in enumerate(rows)}

    for index, row in enumerate(rows):
        values = values_of(row)
        if not row.applied and not (done and last[row.step] == index):
            continue
        if values != reference.rows.get(row.step):
            found.append(
                f"step {row.step} of attempt {row.attempt} differs: {values}, undisturbed "
                f"{reference.rows.get(row.step)}"
            )
            break

    missing = sorted(set(reference.rows) - {row.step for row in rows})
    if done and missing:
        found.append(f"{len(missing)} steps have no row, the first is {missing[0]}")
    return found


def sample_problems(run: Path, world: TinyRun) -> list[str]:
    """Check that the effective steps read every row of every chunk exactly once."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for row in latest(run / "metrics.jsonl"):
        spans.setdefault(row.chunk, []).append((row.rows[0], row.rows[1]))
    found = (
        [] if len(spans) == world.chunks else [f"{len(spans)} of {world.chunks} chunks were read"]
    )

    for chunk, pieces in spans.items():
        seen = [row for start, stop in sorted(pieces) for row in range(start, stop)]
        if seen != list(range(world.steps_per_chunk * GLOBAL)):
            found.append(
                f"{chunk}: rows were not read exactly once each ({len(seen)} reads, "
                f"{len(set(seen))} rows)"
            )

    return found


def leftovers(run: Path) -> list[str]:
    """Files that only an unfinished write leaves."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if ".tmp" in path.name)


def lock_held(run: Path) -> bool:
    """True when a live process holds the lock of the run."""
    path = run / "run.lock"
    if not path.exists():
        return False
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(stream, fcntl.LOCK_UN)
    return False


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint with a manifest; -1 when there is none."""
    for path in reversed(list_checkpoints(run / "checkpoints")):
        try:
            return read_manifest(path).step
        except CheckpointError:
            continue
    return -1
