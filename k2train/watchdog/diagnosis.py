"""What one rank finds out, and says, when the run cannot go on: who died, or who is stuck; then what hangs is ended.

Every rank holds its own inquest from the same files and from /proc, and exactly one speaks (`verdict.tell_once`): the lowest
that lives has the first turn. Nothing here needs the main thread or the process group.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from k2train.watchdog.failure_report import end_processes, mark_of, tell_once, verdict_of
from k2train.watchdog.hang_analysis import LOST, Suspect, kind_of, lost_ranks, suspects
from k2train.watchdog.heartbeat import Observer, Process, Record, Seen, stacks_path, state_of
from k2train.watchdog.shared_progress import PeerProgress
from k2train.watchdog.timeouts import Timeouts

LOST_SECONDS = 2.0
"""How long a lost rank is looked for."""
TURN_SECONDS = 1.0
"""How long other ranks leave it to the lowest live one to speak."""
LOOK_SECONDS = 0.05
RANKS_A_SECOND = 500
"""How many heartbeats one rank reads: all ranks of a large run look at the same time, on one file system."""
LEAVE_SECONDS = 3.0
LEAVING = ("failed", "stuck", "behind")
"""Kinds of ranks that end by themselves, given a moment."""


class Diagnosis:
    """Of one rank (`process`) of a run of `world_size` ranks whose heartbeats lie in `directory`.

    A verdict that lies there when this is made belongs to an earlier start. `peers`: ranks whose last moment is known.
    """

    def __init__(
        self,
        directory: Path,
        world_size: int,
        limits: Timeouts,
        process: Process,
        peers: PeerProgress,
        clock: Callable[[], float],
    ) -> None:
        self.directory, self.world_size, self.limits = directory, world_size, limits
        self._process, self._peers, self._clock = process, peers, clock
        self._stale = mark_of(directory)

    def observer(self) -> Observer:
        """Of all ranks of the run."""
        return Observer(self.directory, self.world_size, self._process, self._clock)

    def given(self) -> bool:
        """Whether a rank of this start has given the verdict."""
        mark = mark_of(self.directory)
        return mark is not None and mark != self._stale

    def getting_on(self, observer: Observer) -> bool:
        """Whether a rank that runs says that its work gets on: it has its own clock, and others may wait for it."""
        return any(
            kind_of(one, self.limits.silent_after) is None
            and (record := one.record) is not None
            and record.at_work
            and record.progress > 0
            and record.seconds < self.limits.seconds(self.limits.clock_of(record.phase), ())
            for one in observer.seen().values()
        )

    def stalled(self, own: Record, observer: Observer, say: Callable[[str], object]) -> None:
        """This rank, `own`, is over its limit: say who is the cause, if it is this rank's turn, and end what hangs."""
        seen = self._fresh(observer)
        found = suspects(seen, self.limits.silent_after)
        told = self._tell(
            own, found, seen, f"{own.who()} is stuck: {own.where()}; {own.exchange()}"
        )
        if told:
            say(told)
        self._end(found)

    def lost(self, own: Record, problem: str) -> str:
        """A collective of this rank raised `problem`, or a rank of this machine is gone: the line, if it is to say it."""
        observer = self.observer()
        patience = LOST_SECONDS
        while True:
            if self.given():
                return ""
            observer.sample()
            seen = self._fresh(observer)
            found = lost_ranks(seen, self.limits.silent_after)
            if any(one.kind in LOST for one in found):
                break
            if any(one.record is not None and not one.process for one in seen.values()):
                # Of a rank on another machine only its silence can be seen.
                patience = max(LOST_SECONDS, self.limits.silent_after + 0.5)
            if self._clock() - observer.began >= patience:
                break
            time.sleep(max(LOOK_SECONDS, self.world_size / RANKS_A_SECOND))
        otherwise = f"{own.who()} lost its connection at {own.where()}; {own.exchange()}; no other rank is gone"
        told = self._tell(own, found, seen, f"{otherwise}: {problem}" if problem else otherwise)
        self._end(found)
        return told

    def _fresh(self, observer: Observer) -> dict[int, Seen]:
        seen = observer.seen()
        return {
            rank: one if one.record is None else replace(one, record=self._peers.fresh(one.record))
            for rank, one in seen.items()
        }

    def _tell(
        self, own: Record, found: list[Suspect], seen: Mapping[int, Seen], otherwise: str
    ) -> str:
        """The line, when this rank is the one to say it: the lowest live one, or whoever comes first after a while."""
        line = otherwise
        if found:
            first = found[0].seen.record
            waited = own.seconds if first is not None and first.step == own.step else 0.0
            line = found[0].line(str(stacks_path(self.directory, found[0].rank)), waited)
            others = ", ".join(str(one.rank) for one in found[1:9])
            line += f" (so it is with rank{'s' * (len(found) > 2)} {others})" if others else ""
        culprits = {one.rank for one in found}
        live = [
            rank for rank, one in seen.items() if rank not in culprits and one.record is not None
        ]
        until = self._clock() + (TURN_SECONDS if live and own.rank > min(live) else 0.0)
        while self._clock() < until:
            if self.given():
                return ""
            time.sleep(LOOK_SECONDS)
        verdict = verdict_of(line, found, seen, own)
        return line if tell_once(self.directory, verdict, self._stale) else ""

    def _end(self, found: list[Suspect]) -> None:
        processes = {
            one.seen.record.process: one.kind for one in found if one.seen.record is not None
        }
        processes.pop(self._process, None)
        # One that failed is at its own message, and one that lives has a watch, which writes its stacks and ends it.
        until = self._clock() + LEAVE_SECONDS
        while self._clock() < until and any(
            kind in LEAVING and state_of(process, self._process) == "running"
            for process, kind in processes.items()
        ):
            time.sleep(LOOK_SECONDS)
        end_processes(processes, self._process)
