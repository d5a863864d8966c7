"""Hang analysis: find the rank that blocks the others, for the watchdog and for who_is_stuck.

- A process that is dead, stopped or silent is the cause, whatever the others wait for.
- If all are alive, the cause is a rank outside any collective while others wait in theirs.
- If all are in collectives, the cause is the rank furthest behind.
- Collective counts are compared last, because pipeline ranks have different counts in one step.

Alternatives considered:
- The rank that has been in its step the longest: all began it together.
- The first rank that exceeded its timeout: it waits for another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from k2train.watchdog.heartbeat import Heartbeat, RankStatus
from k2train.watchdog.timeouts import limit_key

FaultKind = Literal["failed", "died", "stopped", "silent", "missing", "stuck", "behind"]
LOST: tuple[FaultKind, ...] = ("failed", "died")
DEAD: tuple[FaultKind, ...] = ("failed", "died", "stopped", "silent", "missing")


@dataclass(frozen=True)
class FaultyRank:
    """A rank that blocks the others, and the kind of fault."""

    rank: int
    kind: FaultKind
    status: RankStatus

    def line(self, stacks: str = "", seconds: float = 0.0) -> str:
        """Describe the fault in one line.

        `stacks` is the path of the Python stacks; `seconds` is how long others have waited in that
        step.
        """
        record = self.status.record
        if record is None:
            return f"rank {self.rank} has not started: it has written no heartbeat"
        if self.kind == "failed":
            return (
                f"{record.rank_text()} failed at {record.phase_text()}: "
                f"{record.problem or 'see its own error message'}"
            )
        if self.kind == "died":
            return f"{record.rank_text()} died at {record.phase_text()}; {record.collective_text()}"

        # The last heartbeat of a process that does not run only covers the time before.
        seconds = max(
            seconds, record.seconds + (self.status.silent_seconds if self.kind in DEAD else 0.0)
        )
        what = {
            "stopped": "is stopped (SIGSTOP)",
            "silent": f"gives no sign of life for {self.status.silent_seconds:.0f} s",
            "stuck": "is stuck",
            "behind": "is furthest behind, all ranks wait for others",
        }[self.kind]
        text = (
            f"{record.rank_text()} {what}: {record.phase_text()}, for {seconds:.0f} s; "
            f"{record.collective_text()}"
        )
        if not stacks:
            return text
        slow = f"; if it is only slow, raise {limit_key(record.phase)}"
        return f"{text}; stacks in {stacks}{slow if self.kind in ('stuck', 'behind') else ''}"


def fault_kind(status: RankStatus, silent_after: float) -> FaultKind | None:
    """Classify one rank by itself; None for a live rank, or one that left in order."""
    record = status.record
    if record is None:
        return "missing" if status.silent_seconds >= silent_after else None
    if record.state == "failed":
        return "failed"
    if not record.at_work:
        return None
    if status.process == "gone":
        return "died"
    if status.process == "stopped":
        return "stopped"
    return "silent" if status.silent_seconds >= silent_after else None


def find_dead_ranks(statuses: Mapping[int, RankStatus], silent_after: float) -> list[FaultyRank]:
    """Ranks that failed, died, stopped, fell silent or never started, worst kind first."""
    found = [
        FaultyRank(rank, kind, one)
        for rank, one in sorted(statuses.items())
        if (kind := fault_kind(one, silent_after)) is not None
    ]
    return sorted(found, key=lambda faulty: DEAD.index(faulty.kind))


def find_faulty_ranks(statuses: Mapping[int, RankStatus], silent_after: float) -> list[FaultyRank]:
    """Ranks that block the run: the dead ones, else the live rank that the others wait for.

    May be empty.
    """
    lost = find_dead_ranks(statuses, silent_after)
    if lost:
        return lost

    # All are alive: rank them by who is least likely to be waiting.
    candidates = sorted(
        (blame_order(record, one.moving), rank)
        for rank, one in statuses.items()
        if (record := one.record) is not None and record.at_work
    )
    if not candidates:
        return []

    # The least likely to be waiting blocks the others.
    rank = candidates[0][1]
    record = statuses[rank].record
    assert record is not None, "only ranks with a record were looked at"
    return [
        FaultyRank(
            rank, "behind" if record.current and len(candidates) > 1 else "stuck", statuses[rank]
        )
    ]


def blame_order(record: Heartbeat, moving: bool) -> tuple[bool, bool, int, int]:
    """Sort key of a live rank; the most likely cause sorts first."""
    return moving, bool(record.current), record.step, record.count
