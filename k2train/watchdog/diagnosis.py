"""Failure diagnosis: find the rank that died or hung, report it once, and kill hung processes.

- Each rank diagnoses independently, from the same heartbeat files and from /proc.
- Exactly one rank reports (`publish_report`): the lowest live rank goes first.
- No step needs the main thread or the process group.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from k2train.processes import Process, process_state
from k2train.watchdog.failure_report import build_report, kill_processes, publish_report, report_id
from k2train.watchdog.hang_analysis import (
    LOST,
    FaultyRank,
    fault_kind,
    find_dead_ranks,
    find_faulty_ranks,
)
from k2train.watchdog.heartbeat import Heartbeat, Observer, RankStatus, stacks_path
from k2train.watchdog.shared_progress import PeerProgress
from k2train.watchdog.timeouts import Timeouts

LOST_SECONDS = 2.0
"""Time in which a dead rank is searched for."""
TURN_SECONDS = 1.0
"""Head start of the lowest live rank before others report."""
LOOK_SECONDS = 0.05
RANKS_A_SECOND = 500
"""Rate at which one rank reads heartbeats.

All ranks of a large run read at the same time, from one file system.
"""
LEAVE_SECONDS = 3.0
LEAVING = ("failed", "stuck", "behind")
"""Kinds of faulty ranks that exit by themselves within a moment."""


class Diagnosis:
    """Failure diagnosis on one rank (`process`) of `world_size`; heartbeats are in `directory`.

    A report that exists at construction belongs to an earlier start. `peers` holds ranks whose
    shared progress is mapped.
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
        """Create an observer of all ranks of the run."""
        return Observer(self.directory, self.world_size, self._process, self._clock)

    def is_reported(self) -> bool:
        """Whether a rank of this start has published the failure report."""
        current = report_id(self.directory)
        return current is not None and current != self._earlier

    def others_progress(self, observer: Observer) -> bool:
        """Whether a live rank reports progress in a phase within its own timeout.

        Others may be waiting for it.
        """
        return any(
            fault_kind(one, self.limits.silent_after) is None
            and (record := one.record) is not None
            and record.at_work
            and record.progress > 0
            and record.seconds < self.limits.seconds(self.limits.clock_of(record.phase), ())
            for one in observer.statuses().values()
        )

    def stalled(
        self,
        own: Heartbeat,
        observer: Observer,
        log: Callable[[str], object],
        reported: Callable[[], object] = lambda: None,
    ) -> None:
        """Diagnose a stall after this rank, `own`, exceeded its timeout.

        Logs the cause if it is this rank's turn, calls `reported`, which may hang for good, and
        kills the processes that hang.
        """
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

        reported()
        self._kill(faulty)

    def connection_lost(self, own: Heartbeat, problem: str) -> str:
        """Diagnose a collective of this rank that raised `problem`, or a dead rank of this machine.

        Returns the message to print, "" when another rank prints it.
        """
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
                # Only the silence of a rank on another machine can be observed.
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
        """Publish the report when it is this rank's turn; returns the message to print.

        The lowest live rank goes first; after a while, the first rank to publish. Returns "" when
        another rank published.
        """
        line = default_message
        if faulty:
            first = faulty[0].status.record
            # A faulty rank in the same step has kept this one waiting for all of its own time.
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

        # The lowest live rank publishes at once, all others wait for their turn.
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
        # This process ends itself, with its own exit code.
        processes.pop(self._process, None)

        # A failed rank is printing its own error. A live one has a watchdog, which dumps its stacks
        # and exits.
        deadline = self._clock() + LEAVE_SECONDS

        while self._clock() < deadline and any(
            kind in LEAVING and process_state(process, self._process) == "running"
            for process, kind in processes.items()
        ):
            time.sleep(LOOK_SECONDS)

        kill_processes(processes, self._process)
