"""Heartbeat thread: the thread of the watchdog that touches files.

- It writes this rank's heartbeat, finds the other ranks of this machine and checks that they run.
- It exits as soon as another rank has published the failure report.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable

from k2train.errors import EXIT_FAILED
from k2train.processes import Process, process_state
from k2train.watchdog.diagnosis import Diagnosis
from k2train.watchdog.heartbeat import read_heartbeat
from k2train.watchdog.own_heartbeat import OwnHeartbeat
from k2train.watchdog.phase_timer import TICK_SECONDS
from k2train.watchdog.shared_progress import PeerProgress

TRACED_SECONDS = 600.0
"""Time for which the others wait for a rank that a debugger holds: enough to load symbols."""

RANKS_BESIDE = 64
"""Ranks below and above this one that may run on its machine: those of a machine are consecutive.

Looking for all ranks, a world of 16,384 would open 268 million files while it starts.
"""


class HeartbeatThread(threading.Thread):
    """Writes heartbeats and watches the ranks of this machine until `ended`.

    - `dead_since` and `stopped_since` say since when one of them is gone, or stopped (SIGSTOP).
    - One that a debugger holds is waited for, up to `TRACED_SECONDS`; `log` gets a line about it.
    """

    def __init__(
        self,
        own: OwnHeartbeat,
        diagnosis: Diagnosis,
        peer_progress: PeerProgress,
        ended: threading.Event,
        log: Callable[[str], None],
        exit_process: Callable[[int], object],
    ):
        super().__init__(name="watch-heartbeat", daemon=True)
        self._log = log
        self._traced_since: float | None = None
        self._own, self._diagnosis, self._peer_progress = own, diagnosis, peer_progress
        self._ended, self._exit_process = ended, exit_process
        self._peers: dict[int, Process] = {}
        rank, world_size = own.member.rank, own.member.world_size
        near = range(max(rank - RANKS_BESIDE, 0), min(rank + RANKS_BESIDE + 1, world_size))
        self._unseen_ranks = {*near} - {rank}
        self.dead_since: float | None = None
        self.stopped_since: float | None = None

    def run(self) -> None:
        """Write a heartbeat every `heartbeat_seconds`, and at once in a phase that lasts."""
        timer, heartbeat_seconds = self._own.timer, self._diagnosis.limits.heartbeat_seconds
        written, written_phase = time.monotonic(), timer.current
        while not self._ended.wait(min(TICK_SECONDS, heartbeat_seconds)):
            now = time.monotonic()
            # A phase that lasts is written at once, one that passes quickly is not worth a write.
            lasting = timer.current != written_phase and now - timer.current.changed >= TICK_SECONDS
            if self._unseen_ranks and self._own.ending_since is None:
                with contextlib.suppress(OSError):
                    self._find_peers()

            if now - written < heartbeat_seconds and not lasting:
                continue

            written, written_phase = now, timer.current
            with contextlib.suppress(OSError):
                self._own.write()
                self._check_peers()

    def _check_peers(self) -> None:
        """Exit when another rank reported a failure; note dead or stopped ranks of this machine."""
        if self._own.ending_since is None and self._diagnosis.is_reported():
            self._own.dump("another rank ended the run")
            self._exit_process(EXIT_FAILED)

        states = {
            rank: process_state(process, self._own.process) for rank, process in self._peers.items()
        }
        self._wait_for_traced([rank for rank, state in states.items() if state == "traced"])
        if "stopped" not in states.values():
            self.stopped_since = None
        elif self.stopped_since is None:
            self.stopped_since = time.monotonic()

        for rank, state in states.items():
            if self.dead_since is None and state == "gone":
                record = read_heartbeat(self._own.directory, rank)
                if record is not None and (record.at_work or record.state == "failed"):
                    self.dead_since = time.monotonic()

    def _wait_for_traced(self, traced: list[int]) -> None:
        """Let no rank count as stuck while a debugger or profiler holds one of this machine."""
        if not traced:
            self._traced_since = None
            return
        now = time.monotonic()
        if self._traced_since is None:
            self._traced_since = now
            # Of the ranks that run, the first one tells.
            if self._own.member.rank < min({*self._peers} - {*traced}, default=math.inf):
                self._log(
                    f"rank {traced[0]} is held by a debugger or profiler; the others wait for it, "
                    f"at most {TRACED_SECONDS:.0f} s"
                )
        if now - self._traced_since < TRACED_SECONDS:
            self._own.timer.progress()

    def _find_peers(self) -> None:
        """Find ranks of this machine that have started since."""
        for rank in sorted(self._unseen_ranks):
            record = read_heartbeat(self._own.directory, rank)
            # A closed record belongs to an earlier start: the rank has not started in this one.
            if (
                record is not None
                and record.at_work
                and process_state(record.process, self._own.process) != "gone"
            ):
                self._unseen_ranks.discard(rank)
                if process_state(record.process, self._own.process):
                    self._peers[rank] = record.process
                    self._peer_progress.attach(record)
