"""What the ledger says of earlier spikes: returns, their folders, and stops that need a decision.

- A return that was recorded counts, also if a kill came before the run went back: the next start
  begins at its checkpoint, or an older one.
- A run that stopped because of a spike goes on only after somebody has decided how.

Alternatives considered:
- Files beside the ledger: a kill between the two would leave them apart.
"""

from collections.abc import Iterable, Sequence

from k2train.config.load import Config
from k2train.errors import RunError
from k2train.guard.crash_loop import STARTS
from k2train.record.events import (
    Entry,
    Resumed,
    Spike,
    Started,
    Stopped,
    deferrals_of,
    of_kind,
)
from k2train.record.rollback_events import RolledBack

STOPPED_BY_SPIKE = "spike"
"""Reason of a `stopped` event of a run that a spike has stopped."""
OPENINGS = ("opened", "restart")
"""Kinds of `spike` events that begin one."""
REGION_STEPS = 100
"""Steps behind the end of a branch within which the next spike counts as the same one again."""


def moves_of(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Return the entries that move chunks, and the returns that move none."""
    return tuple(e for e in entries if deferrals_of(e.event) or isinstance(e.event, RolledBack))


def unfinished_return(entries: Sequence[Entry]) -> RolledBack | None:
    """Return the last return, if no start has gone back to its checkpoint since."""
    for entry in reversed(entries):
        if isinstance(entry.event, Started | Resumed):
            return None
        if isinstance(entry.event, RolledBack):
            return entry.event
    return None


def permission_of_step(step: int) -> str:
    """Name in `run.allow` that lets a run go on after a stop at `step`; of that stop alone."""
    return f"spike_at_{step}"


def check_decided(config: Config, entries: Sequence[Entry]) -> None:
    """Raise RunError when the last start was stopped by a spike, and nobody has decided since.

    A decision is another checkpoint (`run.resume`) or the stop's name in `run.allow`.
    """
    events = [entry.event for entry in entries]
    last = next((e for e in reversed(events) if isinstance(e, (Stopped, *STARTS))), None)
    if not isinstance(last, Stopped) or last.reason != STOPPED_BY_SPIKE:
        return
    resume, resumed = config.run.resume, of_kind(entries, Resumed)
    # The same number in the command that was stopped is no decision about the stop.
    chosen = isinstance(resume, int) and not (resumed and resumed[-1].requested == resume)
    permission = permission_of_step(last.step)
    if chosen or permission in config.run.allow:
        return
    raise RunError(
        f"the last start was stopped by a spike at step {last.step}: {last.problem}; decide how to "
        f"go on: from an earlier checkpoint (run.resume=NUMBER), or as it is "
        f"(run.allow=[{permission}])"
    )


def spike_number(entries: Sequence[Entry], onset: int) -> int:
    """Return the number of the spike that began at `onset`; the next free one if it is new.

    A start that repeats the steps of a killed one meets the same spike again.
    """
    numbers: dict[int, int] = {}
    highest = 0
    for event in (entry.event for entry in entries):
        if isinstance(event, RolledBack):
            # What comes next is another course of the run, also at the same steps.
            highest = max(highest, event.number)
            numbers = {}
        elif isinstance(event, Spike) and event.kind in OPENINGS:
            began = event.onset or event.step
            highest += began not in numbers
            numbers.setdefault(began, highest)
    return numbers.get(onset, highest + 1)


def last_hit(returns: Sequence[RolledBack], onset: int) -> RolledBack | None:
    """Return the last return because of data, if a spike at `onset` is in its region."""
    last = next((event for event in reversed(returns) if event.chunks), None)
    # A spike before its checkpoint is of a run that somebody has taken back further.
    near = last is not None and last.step < onset <= last.from_step + REGION_STEPS
    return last if near else None


def was_seen_before(entries: Sequence[Entry], first_step: int, steps: int) -> bool:
    """Whether a spike of the first `steps` steps from `first_step` on is older than this start.

    An earlier start that passed the checkpoint without a restart met it, too: then it is no fault
    of the restart. The course of the run must be the same since.
    """
    begun: dict[int, int] = {}
    seen = False
    for event in (entry.event for entry in entries):
        if isinstance(event, RolledBack):
            seen = False
        elif isinstance(event, Started | Resumed):
            begun[event.attempt] = event.step if isinstance(event, Resumed) else 0
        elif isinstance(event, Spike) and event.kind in OPENINGS:
            began = event.onset or event.step
            within = first_step <= began < first_step + steps
            passed = began - begun.get(event.attempt, 0) > steps
            seen = seen or (within and passed)
    return seen
