"""Who holds a run up, judged from what the ranks say and do: the same answer for the watch and for the tool.

A process that is gone, stopped or silent is the cause whatever the others wait for. With all alive, the cause is a rank that
is in no collective while others wait in theirs; with all in collectives, the one furthest behind. Numbers of collectives
are compared only after that: pipeline ranks have different ones in the same step. Refused: the rank that has been longest
in its step (all began it together), and the first that ran into its limit (it waits for another).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from k2train.watchdog.heartbeat import Heartbeat, RankStatus

FaultKind = Literal["failed", "died", "stopped", "silent", "missing", "stuck", "behind"]
LOST: tuple[FaultKind, ...] = ("failed", "died")
DEAD: tuple[FaultKind, ...] = ("failed", "died", "stopped", "silent", "missing")


@dataclass(frozen=True)
class FaultyRank:
    """A rank that holds the others up, and why it is thought so."""

    rank: int
    kind: FaultKind
    status: RankStatus

    def line(self, stacks: str = "", seconds: float = 0.0) -> str:
        """One line for people; `stacks`: where Python stacks lie; `seconds`: how long others have waited in that step."""
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
        # The last heartbeat of one that does not run says only how long it was there before.
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
        return f"{text}; stacks in {stacks}" if stacks else text


def fault_kind(status: RankStatus, silent_after: float) -> FaultKind | None:
    """What is wrong with one rank by itself; None with one that lives, or that has left as it should."""
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
    """The ranks that are no longer there, worst kind first."""
    found = [
        FaultyRank(rank, kind, one)
        for rank, one in sorted(statuses.items())
        if (kind := fault_kind(one, silent_after)) is not None
    ]
    return sorted(found, key=lambda faulty: DEAD.index(faulty.kind))


def find_faulty_ranks(statuses: Mapping[int, RankStatus], silent_after: float) -> list[FaultyRank]:
    """Who holds up a run that does not go on: the lost ones, else the one alive that the others wait for; may be empty."""
    lost = find_dead_ranks(statuses, silent_after)
    if lost:
        return lost
    candidates = sorted(
        (blame_order(record, one.moving), rank)
        for rank, one in statuses.items()
        if (record := one.record) is not None and record.at_work
    )
    if not candidates:
        return []
    rank = candidates[0][1]
    record = statuses[rank].record
    assert record is not None, "only ranks with a record were looked at"
    return [
        FaultyRank(
            rank, "behind" if record.current and len(candidates) > 1 else "stuck", statuses[rank]
        )
    ]


def blame_order(record: Heartbeat, moving: bool) -> tuple[bool, bool, int, int]:
    """Sort key of a live rank, the most suspicious first."""
    return moving, bool(record.current), record.step, record.count
