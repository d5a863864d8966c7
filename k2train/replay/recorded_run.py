"""A run as its files have it: ledger, metrics, state roots and checkpoints. No torch.

- The ledger's chain is verified while it is read, and the manifest of each checkpoint is compared
  with the hash that the ledger has of it.
- Of a step that was done several times the last one counts: the others were undone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import (
    CheckpointManifest,
    checkpoint_name,
    is_thinned,
    list_checkpoints,
    manifest_sha256,
    read_manifest,
)
from k2train.errors import CheckpointError, RunError
from k2train.record.events import CheckpointSaved, Entry, of_kind
from k2train.record.followed_events import CheckpointFollowed
from k2train.record.ledger import read_ledger
from k2train.record.metrics import RootRecord, StepRecord, latest, latest_roots
from k2train.retry import exists_retried


@dataclass(frozen=True)
class RecordedRun:
    """What the files of a run say."""

    directory: Path
    entries: tuple[Entry, ...]
    rows: Mapping[int, StepRecord]
    roots: Mapping[int, RootRecord]

    @classmethod
    def read(cls, directory: Path) -> "RecordedRun":
        """Read a run. Raises RunError when it is none, or a line is damaged, naming it."""
        ledger, metrics = directory / "ledger.jsonl", directory / "metrics.jsonl"
        if not exists_retried(ledger):
            raise RunError(f"{directory} is no run: it has no ledger.jsonl")
        rows = latest(metrics) if exists_retried(metrics) else []
        states = directory / "state_roots.jsonl"
        roots = latest_roots(states) if exists_retried(states) else []
        return cls(
            directory,
            tuple(read_ledger(ledger)),
            {row.step: row for row in rows},
            {row.step: row for row in roots},
        )

    @property
    def checkpoints(self) -> list[Path]:
        """Its checkpoints, oldest first."""
        return list_checkpoints(self.directory / "checkpoints")

    def checkpoint(self, number: int) -> Path:
        """Return a numbered checkpoint. Raises CheckpointError when there is none."""
        found = [path for path in self.checkpoints if path.name == checkpoint_name(number)]
        if not found:
            there = ", ".join(path.name for path in self.checkpoints) or "none"
            raise CheckpointError(
                f"{self.directory} has no {checkpoint_name(number)}; there are: {there}"
            )
        return found[0]

    def manifest(self, path: Path) -> CheckpointManifest:
        """Read a manifest that is the one of the ledger. Raises CheckpointError if it is not."""
        manifest, found = read_manifest(path), manifest_sha256(path)
        known = [
            event.manifest_sha256
            for event in of_kind(self.entries, CheckpointSaved)
            if event.checkpoint == path.name
        ]
        if known and found not in known:
            raise CheckpointError(
                f"{path}: its manifest has sha256 {found[:16]}, the ledger recorded "
                f"{known[-1][:16]}: the checkpoint was replaced after it was saved"
            )
        return manifest

    def row(self, step: int) -> StepRecord:
        """Return the metrics row of a step. Raises RunError when there is none."""
        found = self.rows.get(step)
        if found is None:
            raise RunError(
                f"{self.directory / 'metrics.jsonl'} has no row of step {step}: it was "
                "taken out, or lost in a power cut; replay other steps (--steps A:B)"
            )
        return found

    def newest_before(self, step: int) -> Path:
        """Return the newest whole checkpoint of the state before `step`.

        Raises CheckpointError when there is none: thinned ones hold no moments.
        """
        for path in reversed(self.checkpoints):
            if not is_thinned(path) and read_manifest(path).step < step:
                return path
        raise CheckpointError(
            f"{self.directory}: no whole checkpoint before step {step}: replay a later one "
            "(checkpoint.keep_optimizer_states keeps their moments)"
        )

    def config_of(self, attempt: int, otherwise: CheckpointManifest) -> Mapping[str, Any]:
        """Config of a start, from a checkpoint that it saved; else that of `otherwise`."""
        if otherwise.attempt != attempt:
            for path in self.checkpoints:
                manifest = read_manifest(path)
                if manifest.attempt == attempt:
                    return manifest.config
        return otherwise.config

    def setting_of(self, attempt: int) -> dict[str, str] | None:
        """Setting of a start, None where the record has none."""
        found = [
            event for event in of_kind(self.entries, CheckpointFollowed) if event.attempt == attempt
        ]
        return {key: str(value) for key, value in found[0].setting.items()} if found else None


@dataclass(frozen=True)
class Segment:
    """Steps `first` to `last`, done from the checkpoint `begin`; `end` is the one after them."""

    begin: Path
    first: int
    last: int
    end: Path | None = None

    def __str__(self) -> str:
        made = f"{self.end.name} from {self.begin.name}" if self.end else f"from {self.begin.name}"
        steps = f"steps {self.first} to {self.last}" if self.last > self.first else "step"
        return f"{made}, {steps if self.last > self.first else f'step {self.first}'}"


def segment_of_chunk(run: RecordedRun, number: int) -> Segment:
    """Return the steps that made checkpoint `number` from the whole one before it.

    Raises CheckpointError when there is nothing to begin from.
    """
    end = run.checkpoint(number)
    last = run.manifest(end).step
    if number < 1 or last < 1:
        raise CheckpointError(
            f"{end.name} is the state before the first step, no step made it: take a number from 1"
        )
    begin = run.newest_before(first_step_of(run, number))
    return Segment(begin, run.manifest(begin).step + 1, last, end)


def first_step_of(run: RecordedRun, number: int) -> int:
    """Step after the numbered checkpoint before `number`, or after the newest before its end."""
    before = [path for path in run.checkpoints if path.name == checkpoint_name(number - 1)]
    if before:
        return read_manifest(before[0]).step + 1
    return read_manifest(run.checkpoint(number)).step


def segment_of_steps(run: RecordedRun, first: int, last: int) -> Segment:
    """Return the steps from the newest checkpoint before `first` on, up to `last`.

    Raises RunError for steps that the metrics do not have.
    """
    newest = max(run.rows, default=0)
    if not 1 <= first <= last <= newest:
        raise RunError(
            f"steps {first} to {last} are not on record: {run.directory} has 1 to {newest}"
        )
    begin = run.newest_before(first)
    ends = [path for path in run.checkpoints if read_manifest(path).step == last]
    return Segment(begin, run.manifest(begin).step + 1, last, ends[0] if ends else None)
