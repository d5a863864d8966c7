"""Exposures of a row: the steps of a run that read it, their loss, and the checkpoints around them.

- The order of the run, after its deferrals, says which step a row belongs to now. The metrics say
  which steps have read it, of every attempt.
- A step that a later start or a return to a checkpoint undid is listed as `undone`: its rows were
  read, but no weights of today come from it.
- A run that started from a checkpoint of another one has the exposures of that one, too, up to the
  checkpoint. What the other run did afterwards is `after the branch`.
"""

import mmap
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from k2train.data.inspect.run_progress import HELD_OUT, SKIPPED, TO_COME, TRAINED
from k2train.data.inspect.run_usage import METRICS, Run
from k2train.data.loss_mask import learned_of_rows
from k2train.data.trace.row_losses import RowLosses
from k2train.errors import RunError
from k2train.record.events import CheckpointRemoved, CheckpointSaved, Entry, Resumed
from k2train.record.line_check import checked_rows
from k2train.record.metrics import StepRecord, is_scores_line
from k2train.retry import stat_retried

UNDONE, AFTER_BRANCH, NOT_YET = "undone", "after the branch", "not trained yet"


@dataclass(frozen=True)
class Exposure:
    """One use of a row by a run."""

    run: str
    state: str
    step: int | None = None
    attempt: int | None = None
    loss: float | None = None
    """Mean loss of the step."""
    sequence_loss: float | None = None
    """Mean loss of the row in that step, where the run recorded it (`audit.row_losses`)."""
    checkpoint_before: str | None = None
    checkpoint_after: str | None = None


@dataclass(frozen=True)
class Stage:
    """A run whose data are searched; `branch` where a later stage started from its checkpoint."""

    run: Run
    branch: bool = False
    damaged: list[int] = field(default_factory=list)
    """Numbers of damaged metrics lines that were met; each counts once a chunk."""

    @cached_property
    def _losses(self) -> RowLosses:
        return RowLosses(self.run.directory, self.run.order.global_sequences)

    @cached_property
    def _checkpoints(self) -> list[tuple[int, str]]:
        return checkpoint_steps(self.run.entries)

    @cached_property
    def _reads(self) -> dict[str, list[StepRecord]]:
        return {}

    def exposures(self, chunk: str, row: int) -> list[Exposure]:
        """All uses of a row, in the order of steps and attempts."""
        history, name = self.run.history, self.run.name
        held_out = self.run.manifest.held_out
        step, state = history.use(chunk, row, held_out is not None and held_out.name == chunk)
        if state == HELD_OUT:
            return [Exposure(name, HELD_OUT)]

        reads = [record for record in self._records(chunk) if _has(record, row)]
        current = [record for record in reads if record.step == step and state != TO_COME]
        found = [self._of(record, row, record in current[-1:], state) for record in reads]
        if state in (TRAINED, SKIPPED) and not current:
            # The metrics of that step are lost; ledger and checkpoints say that it was done.
            before, after = self._around(step or 0)
            found.append(Exposure(name, state, step, None, None, None, before, after))
        left = any(one.state == AFTER_BRANCH for one in found)
        if not found or (state == TO_COME and not left):
            ahead = NOT_YET if state == TO_COME else state
            ahead = AFTER_BRANCH if self.branch and state == TO_COME else ahead
            found.append(Exposure(name, ahead, step))
        return sorted(found, key=lambda e: (e.step or 0, e.attempt or 0))

    def _of(self, record: StepRecord, row: int, counts: bool, state: str) -> Exposure:
        later = self.branch and record.step > self.run.history.done_step
        what = state if counts else AFTER_BRANCH if later else UNDONE
        around = self._around(record.step) if counts else (None, None)
        own = self._losses.of(record.attempt, record.step, row - record.rows[0], counts)
        mean = None if own is None else own / self._targets(record, row)
        return Exposure(
            self.run.name, what, record.step, record.attempt, record.loss, mean, *around
        )

    def _targets(self, record: StepRecord, row: int) -> int:
        """Targets of a row in the step of `record`."""
        # Another start may have learned every token.
        if record.targets is None or not self.run.folder.has_masks:
            return self.run.manifest.sequence_length - 1
        manifest = self.run.folder
        info = manifest.chunk(record.chunk)
        return int(learned_of_rows(manifest, info, range(row, row + 1)).sum())

    def _around(self, step: int) -> tuple[str | None, str | None]:
        """Newest checkpoint before a step, and the oldest that has it."""
        before = [name for at, name in self._checkpoints if at < step]
        after = [name for at, name in self._checkpoints if at >= step]
        return (before[-1] if before else None, after[0] if after else None)

    def _records(self, chunk: str) -> list[StepRecord]:
        if chunk not in self._reads:
            path = self.run.directory / METRICS
            self._reads[chunk], damaged = reads_of_chunk(path, chunk)
            self.damaged.append(damaged)
        return self._reads[chunk]


def _has(record: StepRecord, row: int) -> bool:
    return len(record.rows) == 2 and record.rows[0] <= row < record.rows[1]


def reads_of_chunk(path: Path, chunk: str) -> tuple[list[StepRecord], int]:
    """Read the metrics of all steps that read a chunk, and the number of damaged lines left out."""
    facts = stat_retried(path)
    if facts is None or facts.st_size == 0:
        return [], 0

    # Searched as bytes: a long run has hundreds of thousands of lines.
    wanted = re.compile(rb'^[^\n]*"chunk": "' + re.escape(chunk.encode()) + rb'"[^\n]*\n', re.M)
    found, damaged = [], 0
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        lines = [match[0][:-1] for match in wanted.finditer(content)]
    lines = [line for line in lines if not is_scores_line(line)]
    for line in lines:
        ((_, row),) = checked_rows(path, [line])
        try:
            if isinstance(row, RunError):
                raise ValueError(str(row))
            found.append(StepRecord.of(row))
        except (ValueError, TypeError):
            damaged += 1
    return found, damaged


def checkpoint_steps(entries: Iterable[Entry]) -> list[tuple[int, str]]:
    """Steps and names of the checkpoints that the ledger says are kept, ascending."""
    kept: dict[str, int] = {}
    for event in (entry.event for entry in entries):
        if isinstance(event, CheckpointSaved):
            kept[event.checkpoint] = event.step
        elif isinstance(event, CheckpointRemoved):
            kept.pop(event.checkpoint, None)
        elif isinstance(event, Resumed):
            for name in event.set_aside:
                kept.pop(name, None)
    return sorted((step, name) for name, step in kept.items())
