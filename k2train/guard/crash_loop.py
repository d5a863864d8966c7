"""Crash-loop detection: refuse to start after N consecutive starts without progress.

- The ledger is the memory, because it outlives the process, the job and the node.
- A start begins at a step: 0, or that of the checkpoint it resumed from. It made progress when it
  saved a checkpoint of a later step, also one saved on a stop request, or finished the stage.
- Steps without a checkpoint do not count, because they will be repeated.
- A requested stop that saved nothing newer neither counts as a failure nor resets the count.

Alternatives considered:
- Counting restarts in the batch script: it does not see how far they came.
"""

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

STARTS = (Starting, Started, Resumed)
"""Events that begin an attempt.

`starting` comes before anything can fail. The others follow it, or stand alone in older ledgers.
"""
WITH_STEP = (ChunkStarted, StepSkipped, Spike, Straggler, CheckpointSaved, Stopped, Finished)
"""Events that say how far an attempt came."""
UNREQUESTED = ("non-finite", "save failed", "damaged")
"""Reasons of a `stopped` event that was not requested."""


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


def check_progress(entries: Sequence[Entry], limit: int, directory: Path) -> None:
    """Raise RunError after `limit` consecutive starts without progress (0: no limit)."""
    streak = fruitless_starts(entries)
    if limit == 0 or len(streak) < limit:
        return

    furthest = max(attempt.start_step for attempt in streak)
    starts = "1 start" if len(streak) == 1 else f"{len(streak)} starts in a row"
    raise RunError(
        f"{starts} got no further than step {furthest} (last: {_describe_end(streak[-1])}); look "
        f"at {directory}/ledger.jsonl and the output of the last start, then start with "
        "run.max_fruitless_starts=0"
    )


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
