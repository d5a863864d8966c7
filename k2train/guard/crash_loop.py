"""Crash-loop detection: refuse to start after N consecutive starts that failed alike.

- The ledger is the memory, because it outlives the process, the job and the node.
- A start begins at a step: 0, or that of the checkpoint it resumed from. It made progress when it
  saved a checkpoint of a later step, also one saved on a stop request, or finished the stage.
- Steps without a checkpoint do not count, because they will be repeated.
- A requested stop that saved nothing newer neither counts as a failure nor resets the count. A file
  system that did not answer is not the run's failure either.
- A start that saved on the way to the step at which it fails like the one before made no progress.
- Alike is the same problem at the same step, without the numbers in its words: which rank dies
  first is chance. A run that others interrupt, each time elsewhere, goes on and is told that it
  saves too seldom.

Alternatives considered:
- Counting every start without progress: three kills from outside before the first save of a chunk,
  which takes hours, would end a healthy run for good.
- Counting restarts in the batch script: it does not see how far they came.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k2train.errors import RunError
from k2train.record.events import (
    CheckpointSaved,
    ChunkStarted,
    Entry,
    Failed,
    Finished,
    Resumed,
    Spike,
    Started,
    Starting,
    StepSkipped,
    Stopped,
    Straggler,
)
from k2train.record.metrics import last_steps
from k2train.record.rollback_events import RolledBack

SHOWN = 5
"""Starts whose ends a message names."""
STARTS = (Starting, Started, Resumed)
"""Events that begin an attempt.

`starting` comes before anything can fail. The others follow it, or stand alone in older ledgers.
"""
WITH_STEP = (ChunkStarted, StepSkipped, Spike, Straggler, CheckpointSaved, Stopped, Finished)
"""Events that say how far an attempt came."""
UNREQUESTED = ("non-finite", "save failed", "damaged")
"""Reasons of a `stopped` event that was not requested."""
CHANCE = re.compile(r" \(pid \d+ on host [^)]*\)|0x[0-9a-f]+|\d+")
"""What differs between two failures that are alike: processes, ranks, addresses, times."""
LAST_SIGN = re.compile(
    r"(?<=died at step )(\d+), [^;]*|; (?:(?:in|last) collective|no collective so far).*$"
)
"""What a rank's last sign of life said of its phase and collective: it is chance, too."""
AT_STEP = re.compile(r"\bat step (\d+)")


@dataclass
class Attempt:
    """One start as recorded in the ledger. `end` is None when the process was killed."""

    number: int
    start_step: int
    last_step: int
    saved_step: int = field(default=-1)
    end: Stopped | Failed | Finished | None = None

    @property
    def is_fruitless(self) -> bool:
        """Whether it ended by itself without a checkpoint later than its first step."""
        return not self.was_requested and self.saved_step <= self.start_step

    @property
    def was_requested(self) -> bool:
        """Whether its end was requested, or it finished the stage."""
        return isinstance(self.end, Finished) or (
            isinstance(self.end, Stopped) and self.end.reason not in UNREQUESTED
        )

    @property
    def failure(self) -> tuple[str, int]:
        """Problem without numbers, and the step: equal for starts that failed alike."""
        if self.end is None or isinstance(self.end, Finished):
            return "killed", self.last_step
        text = self.end.problem or (self.end.reason if isinstance(self.end, Stopped) else "")
        first = (text.splitlines() or [""])[0]
        named = AT_STEP.search(first)
        step = int(named[1]) if named else self.end.step
        alike = CHANCE.sub("#", LAST_SIGN.sub(r"\1", first))
        return alike, self.last_step if step is None else step


def attempts_of(entries: Sequence[Entry]) -> list[Attempt]:
    """List the starts of a run, oldest first."""
    found: list[Attempt] = []
    for event in (entry.event for entry in entries):
        if isinstance(event, STARTS):
            # `started` and `resumed` continue the attempt that `starting` began.
            again = found and found[-1].number == event.attempt
            if not again or isinstance(event, Starting):
                step = 0 if isinstance(event, Started) else event.step
                found.append(Attempt(event.attempt, start_step=step, last_step=step))
            continue

        if not found:
            continue

        current = found[-1]
        if isinstance(event, WITH_STEP):
            current.last_step = max(current.last_step, event.step)

        if isinstance(event, Failed):
            # The next start records a failure that the failed one could not record, and names its
            # attempt.
            failed = next((attempt for attempt in found if attempt.number == event.attempt), None)
            if failed is not None and failed.end is None:
                failed.end = event
        elif isinstance(event, CheckpointSaved):
            # The next start also records a checkpoint that a kill kept out of the ledger. It
            # belongs to the attempt that made it.
            saved_by = next(
                (attempt for attempt in found if attempt.number == event.attempt), current
            )
            saved_by.saved_step = max(saved_by.saved_step, event.step)
        elif isinstance(event, RolledBack):
            # It went back by itself, and the next attempt goes on from there.
            current.end = Stopped(attempt=event.attempt, reason="rolled back", step=event.from_step)
        elif isinstance(event, Stopped | Finished):
            current.end = event

    return found


def fruitless_starts(entries: Sequence[Entry]) -> list[Attempt]:
    """Consecutive latest starts without progress, oldest first."""
    # A requested stop without progress is neither counted nor ends the streak.
    streak: list[Attempt] = []
    for attempt in reversed(attempts_of(entries)):
        if attempt.is_fruitless:
            streak.append(attempt)
        elif attempt.saved_step > attempt.start_step or isinstance(attempt.end, Finished):
            break

    return streak[::-1]


def check_progress(entries: Sequence[Entry], limit: int, directory: Path) -> str:
    """Raise RunError after `limit` consecutive starts that failed alike (0: no limit).

    Returns what to tell of as many that failed each time elsewhere; "" for fewer.
    """
    attempts, streak = attempts_of(entries), fruitless_starts(entries)
    failed = [attempt for attempt in attempts if not attempt.was_requested]
    if limit == 0 or len(failed) < limit:
        return ""

    latest = attempts[-1]
    got_on = latest.was_requested and latest.saved_step > latest.start_step
    others = len({attempt.failure[0] for attempt in failed[-limit:]}) > 1
    if len(streak) < limit and (got_on or others):
        # Nothing can be alike, so the metrics need not be read.
        return ""

    # Without an error message only the metrics know how far a start came.
    first = min(attempt.number for attempt in (*streak, *failed[-limit:]))
    steps = last_steps(directory / "metrics.jsonl", first)
    for attempt in (*attempts, *streak):
        attempt.last_step = max(attempt.last_step, steps.get(attempt.number, 0))

    alike = _failed_alike(attempts)
    if len(alike) == 1 and not alike[0].is_fruitless:
        # A single start that saved got on, wherever it ended: nothing was alike yet.
        alike = []
    if len(alike) < limit:
        if len(streak) < limit:
            return ""
        furthest = max(attempt.start_step for attempt in streak)
        ends = ", ".join(str(attempt.failure[1]) for attempt in streak[-SHOWN:])
        return (
            f"the last {len(streak)} starts saved nothing after step {furthest}; they ended each "
            f"time elsewhere (last at steps {ends}), so this one goes on: it is interrupted more "
            "often than it saves"
        )

    starts = "1 start" if len(alike) == 1 else f"{len(alike)} starts in a row"
    furthest = max(max(attempt.start_step, attempt.saved_step) for attempt in alike)
    raise RunError(
        f"{starts} got no further than step {furthest} (last: {_describe_end(alike[-1])}); look "
        f"at {directory}/ledger.jsonl and the output of the last start, then start with "
        "run.max_fruitless_starts=0"
    )


def _failed_alike(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Consecutive latest starts that failed alike, oldest first.

    Also those that saved on the way to the step at which all of them fail: they do not get past it.
    """
    found: list[Attempt] = []
    for attempt in reversed(attempts):
        problem, step = attempt.failure
        if attempt.was_requested:
            # A stop on request ends the row if it came further.
            if attempt.saved_step > attempt.start_step and not (
                found and attempt.last_step < found[0].failure[1]
            ):
                break
        elif (found and (problem, step) != found[0].failure) or not (
            attempt.is_fruitless or step > attempt.saved_step
        ):
            break
        else:
            found.append(attempt)
    return found[::-1]


def _describe_end(attempt: Attempt) -> str:
    """How a start ended, in a few words."""
    end = attempt.end
    if end is None:
        return f"killed after step {attempt.last_step} without an error message"
    problem = None if isinstance(end, Finished) else end.problem
    text = problem or (end.reason if isinstance(end, Stopped) else end.name)
    first, *more = text.splitlines() or [text]
    step = attempt.last_step if end.step is None else end.step
    return (
        f"{first}{' ...' if more else ''}" if f"step {step}" in first else f"{first} at step {step}"
    )
