"""Failure history: what a run measured of its failures, training time and saves in earlier starts.

- Read from the ledger and the metrics of the run, oldest events left out: it tells of the machines
  as they are now.
- A failure is an end that nobody asked for, of a start that had trained. Stops on request and
  failures before the first step cost no training.
- Time is counted in the steps of the metrics, which come from a monotonic clock. Where they are
  lost, it is the time between a start's first and last event.

Alternatives considered:
- The time between two starts: it holds the wait for nodes, in which nothing can be lost.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from k2train.guard.crash_loop import Attempt, attempts_of, fruitless_starts
from k2train.record.events import CheckpointSaved, Entry, Failed, Resumed, Started
from k2train.record.metrics import POSITION, step_lines_backwards

WINDOW_FAILURES = 16
"""Latest failures that count: more would hide that machines became better or worse."""
WINDOW_SAVES = 5
"""Latest saves that count."""
MOST_ROWS = 100_000
"""Latest steps that are read: weeks of a large run."""
SECONDS = re.compile(rb'"seconds": ([0-9.e+-]+)')


class SaveCost(NamedTuple):
    """What one save cost, in seconds."""

    stall: float
    """Time for which training waited."""
    seconds: float
    """Time until the checkpoint was whole."""


class TrainingTime(NamedTuple):
    """Steps of one start and the seconds they took."""

    steps: int
    seconds: float


@dataclass(frozen=True)
class FailureHistory:
    """Measurements of the starts before this one."""

    failures: int = 0
    device_seconds: float = 0.0
    """Training time, times the devices that trained."""
    step_seconds: float | None = None
    """Mean time of a step of the latest start that trained; None if none did."""
    interrupted_seconds: float | None = None
    """Shortest training of the latest starts that saved nothing newer; None if the last one did."""
    saves: tuple[SaveCost, ...] = ()


def read_history(entries: Sequence[Entry], metrics: Path, attempt: int) -> FailureHistory:
    """Measure the starts before number `attempt`.

    Raises UnavailableError while the metrics cannot be read, OSError when they never will.
    """
    before = [entry for entry in entries if getattr(entry.event, "attempt", 0) < attempt]
    attempts = attempts_of(before)
    failed = [found.number for found in attempts if not found.was_requested]
    first = failed[-WINDOW_FAILURES] if len(failed) > WINDOW_FAILURES else 0
    attempts = [found for found in attempts if found.number >= first]

    rows = training_times(metrics, first) if attempts else {}
    events = [entry.event for entry in before]
    worlds = {e.attempt: e.world_size for e in events if isinstance(e, Started | Resumed)}
    trained = {
        found.number: time
        for found in attempts
        if (time := rows.get(found.number) or _time_in_ledger(found, before)).seconds > 0
    }

    stuck = [trained[a.number].seconds for a in fruitless_starts(before) if a.number in trained]
    steps = [time for time in trained.values() if time.steps > 0]
    saves = [e for e in events if isinstance(e, CheckpointSaved) and e.seconds is not None]
    return FailureHistory(
        failures=sum(not a.was_requested and a.number in trained for a in attempts),
        device_seconds=sum(
            time.seconds * worlds.get(number, 1) for number, time in trained.items()
        ),
        step_seconds=steps[-1].seconds / steps[-1].steps if steps else None,
        interrupted_seconds=min(stuck, default=None),
        saves=tuple(_cost(saved) for saved in saves[-WINDOW_SAVES:]),
    )


def training_times(path: Path, first_attempt: int) -> dict[int, TrainingTime]:
    """Return attempt -> its steps and their seconds, of `first_attempt` and later ones.

    Reads the metrics from the end, as far as these attempts reach and `MOST_ROWS` at most.
    """
    found: dict[int, TrainingTime] = {}
    for number, line in enumerate(step_lines_backwards(path)):
        position, seconds = POSITION.match(line), SECONDS.search(line)
        if position is None or seconds is None:
            continue
        attempt = int(position[2])
        if attempt < first_attempt:
            break
        if number >= MOST_ROWS:
            # Only part of its rows was read: the ledger's times are nearer to the truth.
            found.pop(attempt, None)
            break

        # A damaged row is told elsewhere, and ends no run.
        with suppress(ValueError):
            steps, total = found.get(attempt, (0, 0.0))
            found[attempt] = TrainingTime(steps + 1, total + float(seconds[1]))
    return found


def _time_in_ledger(attempt: Attempt, entries: Sequence[Entry]) -> TrainingTime:
    """Time between a start's first and last event; what the next start wrote is left out."""
    times = [
        entry.time
        for entry in entries
        if getattr(entry.event, "attempt", None) == attempt.number
        and not (isinstance(entry.event, Failed) and entry.event.step is None)
        and not (isinstance(entry.event, CheckpointSaved) and entry.event.recovered)
    ]
    if attempt.last_step <= attempt.start_step or not times:
        return TrainingTime(0, 0.0)
    try:
        first, last = (datetime.fromisoformat(times[i]) for i in (0, -1))
        seconds = (last - first).total_seconds()
    except (ValueError, TypeError):
        seconds = 0.0
    # A clock that was set back measures nothing.
    return TrainingTime(attempt.last_step - attempt.start_step, max(0.0, seconds))


def _cost(saved: CheckpointSaved) -> SaveCost:
    """Cost of a save. An older ledger does not know the stall; it was at most the whole time."""
    seconds = saved.seconds or 0.0
    return SaveCost(seconds if saved.stalled_seconds is None else saved.stalled_seconds, seconds)
