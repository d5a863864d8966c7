"""Crash-loop detection: refuse to start after N consecutive starts without progress.

- The ledger is the memory, because it outlives the process, the job and the node.
- A start begins at a step: 0, or that of the checkpoint it resumed from. It made progress when it
  saved a checkpoint of a later step, also one saved on a stop request, or finished the stage.
- Steps without a checkpoint do not count, because they will be repeated.
- A requested stop that saved nothing newer neither counts as a failure nor resets the count.

Alternatives considered:
- Counting restarts in the batch script: it does not see how far they came.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2train.errors import RunError

STARTS = ("starting", "started", "resumed")
"""Events that begin an attempt.

`starting` comes before anything can fail. The others follow it, or stand alone in older ledgers.
"""
UNREQUESTED = ("non-finite", "save failed", "damaged")
"""Reasons of a `stopped` event that was not requested."""


@dataclass
class Attempt:
    """One start as recorded in the ledger. `end` is None when the process was killed."""

    number: int
    start_step: int
    last_step: int
    saved_step: int = field(default=-1)
    end: Mapping[str, Any] | None = None

    @property
    def is_fruitless(self) -> bool:
        """Whether it ended by itself without a checkpoint later than its first step."""
        return not self.was_requested and self.saved_step <= self.start_step

    @property
    def was_requested(self) -> bool:
        """Whether its end was requested, or it finished the stage."""
        if self.end is None:
            return False
        return self.end["event"] == "finished" or (
            self.end["event"] == "stopped" and self.end.get("reason") not in UNREQUESTED
        )


def attempts_of(events: Sequence[Mapping[str, Any]]) -> list[Attempt]:
    """List the starts of a run, oldest first."""
    found: list[Attempt] = []
    for event in events:
        kind, step = event["event"], int(event.get("step") or 0)
        if kind in STARTS:
            number = int(event.get("attempt", len(found) + 1))
            # `started` and `resumed` continue the attempt that `starting` began.
            if not (found and found[-1].number == number and kind != "starting"):
                found.append(Attempt(number, start_step=step, last_step=step))
            continue

        if not found:
            continue

        current = found[-1]
        if kind == "failed":
            # The next start records a failure that the failed one could not record, and names its
            # attempt.
            failed = next(
                (attempt for attempt in found if attempt.number == event.get("attempt")), None
            )
            if failed is not None and failed.end is None:
                failed.end = event
            continue

        current.last_step = max(current.last_step, step)
        if kind == "checkpoint_saved":
            # The next start also records a checkpoint that a kill kept out of the ledger. It
            # belongs to the attempt that made it.
            saved_by = next(
                (attempt for attempt in found if attempt.number == event.get("attempt")), current
            )
            saved_by.saved_step = max(saved_by.saved_step, step)
        elif kind in ("stopped", "finished"):
            current.end = event

    return found


def fruitless_starts(events: Sequence[Mapping[str, Any]]) -> list[Attempt]:
    """Consecutive latest starts without progress, oldest first."""
    # A requested stop without progress is neither counted nor ends the streak.
    streak: list[Attempt] = []
    for attempt in reversed(attempts_of(events)):
        if attempt.is_fruitless:
            streak.append(attempt)
        elif attempt.saved_step > attempt.start_step or (
            attempt.end is not None and attempt.end["event"] == "finished"
        ):
            break

    return streak[::-1]


def check_progress(events: Sequence[Mapping[str, Any]], limit: int, directory: Path) -> None:
    """Raise RunError after `limit` consecutive starts without progress (0: no limit)."""
    streak = fruitless_starts(events)
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
    if attempt.end is None:
        return f"killed after step {attempt.last_step} without an error message"
    text = str(attempt.end.get("problem") or attempt.end.get("reason") or attempt.end["event"])
    first, *more = text.splitlines() or [text]
    step = attempt.end.get("step", attempt.last_step)
    return (
        f"{first}{' ...' if more else ''}" if f"step {step}" in first else f"{first} at step {step}"
    )
