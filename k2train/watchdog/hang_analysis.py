"""Who holds a run up, judged from what the ranks say and do: the same answer for the watch and for the tool.

A process that is gone, stopped or silent is the cause whatever the others wait for. With all alive, the cause is a rank that
is in no collective while others wait in theirs; with all in collectives, the one furthest behind. Numbers of collectives
are compared only after that: pipeline ranks have different ones in the same step. Refused: the rank that has been longest
in its step (all began it together), and the first that ran into its limit (it waits for another).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from k2train.watchdog.heartbeat import Record, Seen

Kind = Literal["failed", "died", "stopped", "silent", "missing", "stuck", "behind"]
LOST: tuple[Kind, ...] = ("failed", "died")
DEAD: tuple[Kind, ...] = ("failed", "died", "stopped", "silent", "missing")


@dataclass(frozen=True)
class Suspect:
    """A rank that holds the others up, and why it is thought so."""

    rank: int
    kind: Kind
    seen: Seen

    def line(self, stacks: str = "", seconds: float = 0.0) -> str:
        """One line for people; `stacks`: where Python stacks lie; `seconds`: how long others have waited in that step."""
        record = self.seen.record
        if record is None:
            return f"rank {self.rank} has not come up: it has written no heartbeat"
        if self.kind == "failed":
            return f"{record.who()} failed at {record.where()}: {record.problem or 'see its own message'}"
        if self.kind == "died":
            return f"{record.who()} died at {record.where()}; {record.exchange()}"
        # The last heartbeat of one that does not run says only how long it was there before.
        seconds = max(
            seconds, record.seconds + (self.seen.silent_seconds if self.kind in DEAD else 0.0)
        )
        what = {
            "stopped": "is stopped (SIGSTOP)",
            "silent": f"gives no sign of life for {self.seen.silent_seconds:.0f} s",
            "stuck": "is stuck",
            "behind": "is furthest behind, all ranks wait for others",
        }[self.kind]
        told = f"{record.who()} {what}: {record.where()}, for {seconds:.0f} s; {record.exchange()}"
        return f"{told}; stacks in {stacks}" if stacks else told


def kind_of(seen: Seen, silent_after: float) -> Kind | None:
    """What is wrong with one rank by itself; None with one that lives, or that has left as it should."""
    record = seen.record
    if record is None:
        return "missing" if seen.silent_seconds >= silent_after else None
    if record.state == "failed":
        return "failed"
    if not record.at_work:
        return None
    if seen.process == "gone":
        return "died"
    if seen.process == "stopped":
        return "stopped"
    return "silent" if seen.silent_seconds >= silent_after else None


def lost_ranks(seen: Mapping[int, Seen], silent_after: float) -> list[Suspect]:
    """The ranks that are no longer there, worst kind first."""
    found = [
        Suspect(rank, kind, one)
        for rank, one in sorted(seen.items())
        if (kind := kind_of(one, silent_after)) is not None
    ]
    return sorted(found, key=lambda suspect: DEAD.index(suspect.kind))


def suspects(seen: Mapping[int, Seen], silent_after: float) -> list[Suspect]:
    """Who holds up a run that does not go on: the lost ones, else the one alive that the others wait for; may be empty."""
    lost = lost_ranks(seen, silent_after)
    if lost:
        return lost
    held = sorted(
        (suspicion(record, one.moving), rank)
        for rank, one in seen.items()
        if (record := one.record) is not None and record.at_work
    )
    if not held:
        return []
    rank = held[0][1]
    record = seen[rank].record
    assert record is not None, "only ranks with a record were looked at"
    return [Suspect(rank, "behind" if record.current and len(held) > 1 else "stuck", seen[rank])]


def suspicion(record: Record, moving: bool) -> tuple[bool, bool, int, int]:
    """Sort key of a live rank, the most suspicious first."""
    return moving, bool(record.current), record.step, record.count
