"""Effective training time: the seconds of a run by what they were spent on, for each attempt.

- *useful*: steps that count in the run as it is now. *redone*: steps that a later attempt or a
  return to an earlier checkpoint undid. *skipped*: steps whose update was left out.
- *saving*: the time for which a save held up the training. *evaluating*: held-out sets.
- *starting*: from the first line of an attempt to its first step. *other*: what is left of an
  attempt; *down*: between attempts, where nothing ran.
- The sums come from `metrics.jsonl`, `held_out.jsonl` and the times in the ledger.

Alternatives considered:
- Times in every row of the metrics: the sum of the steps' own seconds says the same.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime

from k2train.record.events import (
    CheckpointSaved,
    CheckpointsMerged,
    ChunkDeferred,
    Entry,
    LedgerMended,
    Resumed,
    Started,
    Starting,
)
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord


@dataclass(frozen=True)
class Spent:
    """Seconds of one attempt, or of a whole run, by what they were spent on."""

    useful: float = 0.0
    redone: float = 0.0
    skipped: float = 0.0
    saving: float = 0.0
    evaluating: float = 0.0
    starting: float = 0.0
    other: float = 0.0
    down: float = 0.0

    @property
    def total(self) -> float:
        """All seconds."""
        return math.fsum(getattr(self, one.name) for one in fields(self))

    @property
    def effective_share(self) -> float:
        """Useful seconds of all seconds: effective training time. 0 before the first step."""
        return self.useful / self.total if self.total else 0.0


KINDS = tuple(one.name for one in fields(Spent))
BY_TOOLS = (CheckpointsMerged, ChunkDeferred, LedgerMended)
"""Events that a tool may write, with no attempt under way."""


@dataclass(frozen=True)
class AttemptTime:
    """One start of the run, to its last line on record."""

    attempt: int
    began: datetime
    seconds: float
    steps: int
    first_step: int
    last_step: int
    spent: Spent


def kept_attempts(records: Iterable[StepRecord], last_step: int) -> dict[int, int]:
    """Return the attempt whose row of each step counts; steps behind `last_step` do not."""
    kept: dict[int, int] = {}
    for record in records:
        if record.step <= last_step:
            kept[record.step] = max(kept.get(record.step, 0), record.attempt)
    return kept


def attempt_times(
    entries: Sequence[Entry],
    records: Sequence[StepRecord],
    held_out: Iterable[HeldOutRecord] = (),
) -> list[AttemptTime]:
    """Account for the time of every attempt, oldest first.

    `records` are in the order of the file. An attempt reaches from its first line in the ledger to
    its last, or as far as its steps took, if that is longer: a kill leaves no line.
    """
    last = records[-1].step if records else 0
    kept = kept_attempts(records, last)
    scored: dict[int, float] = {}
    for line in held_out:
        scored[line.attempt] = scored.get(line.attempt, 0.0) + (line.seconds or 0.0)

    found: list[AttemptTime] = []
    steps = _by_attempt(records)
    for attempt, lines in _lines_by_attempt(entries).items():
        own = steps.get(attempt, [])
        began = _time(lines[0])
        before = found[-1] if found else None
        down = 0.0 if before is None else (began - before.began).total_seconds() - before.seconds
        spent = _spent(own, kept, lines, scored.get(attempt, 0.0))
        known = math.fsum((spent.total, 0.0))
        seconds = max((_time(lines[-1]) - began).total_seconds(), known)
        spent = Spent(
            **{
                **{name: getattr(spent, name) for name in KINDS},
                "other": seconds - known,
                "down": max(0.0, down),
            }
        )
        numbers = [record.step for record in own]
        found.append(
            AttemptTime(
                attempt,
                began,
                seconds,
                len(own),
                min(numbers, default=0),
                max(numbers, default=0),
                spent,
            )
        )
    return found


def summed(times: Iterable[AttemptTime]) -> Spent:
    """Add up the attempts of a run."""
    parts = [one.spent for one in times]
    return Spent(**{name: math.fsum(getattr(part, name) for part in parts) for name in KINDS})


def _spent(
    own: Sequence[StepRecord], kept: dict[int, int], lines: Sequence[Entry], scored: float
) -> Spent:
    useful: list[float] = []
    redone: list[float] = []
    skipped: list[float] = []
    for record in own:
        seconds = record.seconds if math.isfinite(record.seconds) else 0.0
        if kept.get(record.step) != record.attempt:
            redone.append(seconds)
        else:
            (useful if record.applied else skipped).append(seconds)
    saving = [
        entry.event.stalled_seconds or 0.0
        for entry in lines
        if isinstance(entry.event, CheckpointSaved)
    ]
    return Spent(
        useful=math.fsum(useful),
        redone=math.fsum(redone),
        skipped=math.fsum(skipped),
        saving=math.fsum(saving),
        evaluating=scored,
        starting=_starting(lines),
    )


def _starting(lines: Sequence[Entry]) -> float:
    """Seconds from the first line of an attempt until the run was ready to train."""
    for entry in lines:
        if isinstance(entry.event, Started | Resumed):
            return max(0.0, (_time(entry) - _time(lines[0])).total_seconds())
    return 0.0


def _by_attempt(records: Iterable[StepRecord]) -> dict[int, list[StepRecord]]:
    found: dict[int, list[StepRecord]] = {}
    for record in records:
        found.setdefault(record.attempt, []).append(record)
    return found


def _lines_by_attempt(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    """Return the ledger's lines from the `starting` of each attempt to that of the next one.

    The end of a killed attempt may be recorded by the next: its time is not that of the kill.
    Lines that a tool wrote, perhaps days after the last attempt, belong to none.
    """
    found: dict[int, list[Entry]] = {}
    current = 0
    for entry in entries:
        if isinstance(entry.event, Starting | Started | Resumed):
            current = entry.event.attempt
        if current and not isinstance(entry.event, BY_TOOLS):
            found.setdefault(current, []).append(entry)
    return found


def _time(entry: Entry) -> datetime:
    return datetime.fromisoformat(entry.time)
