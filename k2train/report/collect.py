"""Collection of what a run has on record: its ledger, metrics, scores, config and data manifest.

- Only reads, and needs no torch: it works on a login node while the run trains.
- What is missing or damaged beside the ledger is a note on the page, not an error. The ledger's
  chain is verified.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from k2train.config.load import load_config
from k2train.config.schema import Config
from k2train.data.manifest import Manifest, read_manifest
from k2train.errors import RunError, UserError
from k2train.evaluation.results import TaskResult
from k2train.record.branch import Starts
from k2train.record.events import (
    CheckpointSaved,
    ChunkStarted,
    Entry,
    Event,
    Failed,
    Finished,
    Resumed,
    Started,
    Stopped,
    deferrals_of,
)
from k2train.record.held_out import HeldOutRecord
from k2train.record.ledger import read_ledger
from k2train.record.metrics import StepRecord, checked_records
from k2train.report.evaluation import read_evaluations
from k2train.report.time_account import AttemptTime, attempt_times, kept_attempts
from k2train.retry import is_file_retried, is_folder_retried
from k2train.text import counted

R = TypeVar("R", StepRecord, HeldOutRecord)


@dataclass(frozen=True)
class RunView:
    """A run as it is on record.

    `records` are all rows of the metrics in the order of the file, `scores` those of held-out sets.
    """

    directory: Path
    entries: Sequence[Entry]
    records: Sequence[StepRecord]
    scores: Sequence[HeldOutRecord]
    config_text: str
    config: Config | None
    data: Manifest | None
    notes: Sequence[str]
    evaluations: Sequence[TaskResult] = ()
    """Scores on tasks, of checkpoints as they are now."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.directory.name

    @property
    def events(self) -> list[Event]:
        """Events of the ledger, oldest first."""
        return [entry.event for entry in self.entries]

    @cached_property
    def starts(self) -> Starts:
        """Where its starts began, and which steps they undid."""
        return Starts(self.records)

    @property
    def last_step(self) -> int:
        """Last step of the run as it is now."""
        return self.starts.last_step

    @property
    def total_steps(self) -> int | None:
        """Steps that the run is to have; None in old ledgers."""
        for event in reversed(self.events):
            total = event.total_steps if isinstance(event, Started | Resumed) else None
            if total is not None:
                return int(total)
        return None

    @cached_property
    def kept(self) -> list[StepRecord]:
        """Rows of the steps that count, in order: the curve without what was undone."""
        attempts = kept_attempts(self.records, self.last_step)
        found = {
            record.step: record
            for record in self.records
            if attempts.get(record.step) == record.attempt
        }
        return [found[step] for step in sorted(found)]

    @cached_property
    def undone(self) -> list[StepRecord]:
        """Rows of steps that were done again, or given up, in the order of the file."""
        attempts = kept_attempts(self.records, self.last_step)
        return [one for one in self.records if attempts.get(one.step) != one.attempt]

    @cached_property
    def by_step(self) -> dict[int, list[StepRecord]]:
        """Rows of each step, those of all its starts in the order of the file."""
        found: dict[int, list[StepRecord]] = {}
        for record in self.records:
            found.setdefault(record.step, []).append(record)
        return found

    @cached_property
    def kept_scores(self) -> list[HeldOutRecord]:
        """The last score of each set after each step of the run as it is now."""
        return self.starts.scores(self.scores)

    @cached_property
    def times(self) -> list[AttemptTime]:
        """What the time of each attempt was spent on."""
        return attempt_times(self.entries, self.records, self.scores)

    @property
    def checkpoints(self) -> list[CheckpointSaved]:
        """Checkpoints of the run as it is now, by step; of one saved twice, the newer one."""
        found: dict[str, CheckpointSaved] = {}
        for event in self.events:
            if isinstance(event, CheckpointSaved):
                found[event.checkpoint] = event
            elif isinstance(event, Resumed):
                # Those behind it were set aside: their steps are done anew.
                found = {name: one for name, one in found.items() if one.step <= event.step}
        return sorted(found.values(), key=lambda event: (event.step, event.checkpoint))

    @property
    def chunks(self) -> list[ChunkStarted]:
        """Chunks in the order in which they were begun; of one begun twice, the last time."""
        found: dict[int, ChunkStarted] = {}
        for event in self.events:
            if isinstance(event, ChunkStarted):
                found[event.order_index] = event
            for moved in deferrals_of(event):
                # What was begun behind the step of the return is begun anew.
                found = {index: one for index, one in found.items() if one.step <= moved.step}
        return [found[index] for index in sorted(found)]

    @property
    def status(self) -> str:
        """Whether the run has finished, was stopped, failed or goes on, and how often it began."""
        starts = counted(sum(isinstance(e, Started | Resumed) for e in self.events), "start")
        for event in reversed(self.events):
            if isinstance(event, Finished):
                return f"finished, {starts}"
            if isinstance(event, Stopped):
                return f"stopped at step {event.step:,} ({event.reason}), {starts}"
            if isinstance(event, Failed):
                return f"failed, {starts}"
            if isinstance(event, Started | Resumed):
                break
        return f"not finished, {starts}"


def read_run(directory: Path) -> RunView:
    """Read the record of a run.

    Raises RunError when `directory` is not that of a run, or its ledger is damaged.
    """
    if not is_folder_retried(directory):
        raise RunError(
            f"{directory} is not a directory; give the directory of a run, such as runs/demo-stage1"
        )
    entries = read_ledger(directory / "ledger.jsonl")
    if not entries:
        raise RunError(f"{directory / 'ledger.jsonl'} has no event: this run has not started")

    notes: list[str] = []
    records = _records(directory / "metrics.jsonl", StepRecord, notes)
    scores = _records(directory / "held_out.jsonl", HeldOutRecord, notes)
    text, config = _config(directory / "config.yaml", notes)
    data = _data(config, notes)
    results = read_evaluations(directory, notes)
    return RunView(directory, entries, records, scores, text, config, data, notes, results)


def _records(path: Path, kind: type[R], notes: list[str]) -> list[R]:
    if not is_file_retried(path):
        return []
    found: list[R] = []
    damaged = 0
    for _, record in checked_records(path, kind):
        if isinstance(record, RunError):
            damaged += 1
        else:
            found.append(record)
    if damaged:
        notes.append(f"{counted(damaged, 'damaged line')} of {path.name} left out")
    return found


def _config(path: Path, notes: list[str]) -> tuple[str, Config | None]:
    try:
        return path.read_text(encoding="utf-8"), load_config(str(path))
    except OSError as error:
        notes.append(f"no config: {path.name}: {error.strerror}")
    except (UnicodeDecodeError, UserError) as error:
        notes.append(f"no config: {error}")
    return "", None


def _data(config: Config | None, notes: list[str]) -> Manifest | None:
    if config is None:
        return None
    try:
        return read_manifest(config.data.manifest)
    except UserError as error:
        notes.append(f"no hashes and mix of chunks: {error}")
        return None
