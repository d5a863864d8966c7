"""What one rank finds out, and says, when the run cannot go on: who died, or who is stuck; then what hangs is ended.

Every rank holds its own inquest from the same files and from /proc, and exactly one speaks (`verdict.tell_once`): the lowest
that lives has the first turn. Nothing here needs the main thread or the process group.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from k2train.watchdog.failure_report import build_report, kill_processes, publish_report, report_id
from k2train.watchdog.hang_analysis import (
    LOST,
    FaultyRank,
    fault_kind,
    find_dead_ranks,
    find_faulty_ranks,
)
from k2train.watchdog.heartbeat import (
    Heartbeat,
    Observer,
    Process,
    RankStatus,
    process_state,
    stacks_path,
)
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
        self._earlier = report_id(directory)

    def observer(self) -> Observer:
        """Of all ranks of the run."""
        return Observer(self.directory, self.world_size, self._process, self._clock)

    def is_reported(self) -> bool:
        """Whether a rank of this start has given the verdict."""
        current = report_id(self.directory)
        return current is not None and current != self._earlier

    def others_progress(self, observer: Observer) -> bool:
        """Whether a rank that runs says that its work gets on: it has its own clock, and others may wait for it."""
        return any(
            fault_kind(one, self.limits.silent_after) is None
            and (record := one.record) is not None
            and record.at_work
            and record.progress > 0
            and record.seconds < self.limits.seconds(self.limits.clock_of(record.phase), ())
            for one in observer.statuses().values()
        )

    def stalled(self, own: Heartbeat, observer: Observer, log: Callable[[str], object]) -> None:
        """This rank, `own`, is over its limit: say who is the cause, if it is this rank's turn, and end what hangs."""
        statuses = self._statuses(observer)
        faulty = find_faulty_ranks(statuses, self.limits.silent_after)
        message = self._report(
            own,
            faulty,
            statuses,
            f"{own.rank_text()} is stuck: {own.phase_text()}; {own.collective_text()}",
        )
        if message:
            log(message)
        self._kill(faulty)

    def connection_lost(self, own: Heartbeat, problem: str) -> str:
        """A collective of this rank raised `problem`, or a rank of this machine is gone: the line, if it is to say it."""
        observer = self.observer()
        patience = LOST_SECONDS
        while True:
            if self.is_reported():
                return ""
            observer.sample()
            statuses = self._statuses(observer)
            faulty = find_dead_ranks(statuses, self.limits.silent_after)
            if any(one.kind in LOST for one in faulty):
                break
            if any(one.record is not None and not one.process for one in statuses.values()):
                # Of a rank on another machine only its silence can be seen.
                patience = max(LOST_SECONDS, self.limits.silent_after + 0.5)
            if self._clock() - observer.began >= patience:
                break
            time.sleep(max(LOOK_SECONDS, self.world_size / RANKS_A_SECOND))
        default_message = (
            f"{own.rank_text()} lost its connection at {own.phase_text()}; "
            f"{own.collective_text()}; no other rank is gone"
        )
        message = self._report(
            own, faulty, statuses, f"{default_message}: {problem}" if problem else default_message
        )
        self._kill(faulty)
        return message

    def _statuses(self, observer: Observer) -> dict[int, RankStatus]:
        statuses = observer.statuses()
        return {
            rank: one
            if one.record is None
            else replace(one, record=self._peers.refresh(one.record))
            for rank, one in statuses.items()
        }

    def _report(
        self,
        own: Heartbeat,
        faulty: list[FaultyRank],
        statuses: Mapping[int, RankStatus],
        default_message: str,
    ) -> str:
        """The line, when this rank is the one to say it: the lowest live one, or whoever comes first after a while."""
        line = default_message
        if faulty:
            first = faulty[0].status.record
            waited = own.seconds if first is not None and first.step == own.step else 0.0
            line = faulty[0].line(str(stacks_path(self.directory, faulty[0].rank)), waited)
            others = ", ".join(str(one.rank) for one in faulty[1:9])
            line += f" (likewise rank{'s' * (len(faulty) > 2)} {others})" if others else ""
        culprits = {one.rank for one in faulty}
        live = [
            rank
            for rank, one in statuses.items()
            if rank not in culprits and one.record is not None
        ]
        deadline = self._clock() + (TURN_SECONDS if live and own.rank > min(live) else 0.0)
        while self._clock() < deadline:
            if self.is_reported():
                return ""
            time.sleep(LOOK_SECONDS)
        report = build_report(line, faulty, statuses, own)
        return line if publish_report(self.directory, report, self._earlier) else ""

    def _kill(self, faulty: list[FaultyRank]) -> None:
        processes = {
            one.status.record.process: one.kind for one in faulty if one.status.record is not None
        }
        processes.pop(self._process, None)
        # One that failed is at its own message, and one that lives has a watch, which writes its stacks and ends it.
        deadline = self._clock() + LEAVE_SECONDS
        while self._clock() < deadline and any(
            kind in LEAVING and process_state(process, self._process) == "running"
            for process, kind in processes.items()
        ):
            time.sleep(LOOK_SECONDS)
        kill_processes(processes, self._process)
