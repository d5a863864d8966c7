"""Watchdog of one rank: writes heartbeats, detects hung or dead ranks, ends the run.

- The run ends with one message, from one rank.
- Two daemon threads: one touches files (`heartbeat_thread`), the other never does
  (`timeout_thread`), so a hanging file system cannot stop it.
- Only monotonic clocks decide. Time in which the whole process was stopped (a debugger, a suspended
  job) does not count.
- A main thread that holds Python's lock forever stops both threads, and the heartbeat stops. The
  other ranks see that, and those on the same machine kill the process.
- A world of one has no such peer: it hangs on, and STACKS_SIGNAL sent to it writes its stacks.

Alternatives considered: `faulthandler.dump_traceback_later`, which needs no peer. After a pause of
the process (Ctrl-Z, a suspended job) it reads the frames of threads that run, and crashes a healthy
run: about one dump in 12 in code full of generators.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from k2train.watchdog.diagnosis import Diagnosis
from k2train.watchdog.failure_report import archive_report
from k2train.watchdog.heartbeat import Heartbeat, heartbeats_of, refusal_of
from k2train.watchdog.heartbeat_thread import HeartbeatThread
from k2train.watchdog.own_heartbeat import CommPosition, Member, OwnHeartbeat
from k2train.watchdog.phase_timer import PhaseTimer
from k2train.watchdog.shared_progress import PeerProgress
from k2train.watchdog.timeout_thread import DIAGNOSIS_SECONDS, TimeoutThread
from k2train.watchdog.timeouts import Timeouts

STOPPED = "stopped on request: "
"""Begin of what the last heartbeat of a rank says that left a start on request."""


class Watchdog:
    """Watchdog of one rank.

    - Call `start`, then `phase` during the run, `connection_lost` when a collective raised, and
      `close` at the end in every case.
    - `log` prints a message from a thread while the main thread hangs. It must not take a lock that
      the main thread may hold (os.write does not).
    - `exit_process` ends the process.
    """

    def __init__(
        self,
        directory: Path,
        member: Member,
        limits: Timeouts,
        log: Callable[[str], None],
        comm_position: CommPosition,
        exit_process: Callable[[int], object] = os._exit,
    ):
        self.directory, self.limits = directory, limits
        self._timer = PhaseTimer(limits, time.monotonic)
        self._own = own = OwnHeartbeat(directory, member, self._timer, comm_position)

        peers = PeerProgress(own.process)
        self._diagnosis = Diagnosis(
            directory, member.world_size, limits, own.process, peers, time.monotonic
        )
        self._ended = threading.Event()
        heartbeats = HeartbeatThread(own, self._diagnosis, peers, self._ended, log, exit_process)
        timeouts = TimeoutThread(own, self._diagnosis, heartbeats, self._ended, log, exit_process)
        self._threads = (heartbeats, timeouts)
        self._running = False

    def start(self) -> None:
        """Start the threads and create the directory. Raises OSError.

        Without `heartbeat_seconds` there is no watchdog.
        """
        if self.limits.heartbeat_seconds <= 0:
            return

        self.directory.mkdir(parents=True, exist_ok=True)
        if self._own.member.rank == 0:
            # Readers of the earlier start's report have read it by now.
            archive_report(self.directory)

        self._own.open()
        self._running = True
        for thread in self._threads:
            thread.start()

    def phase(self, name: str, step: int) -> None:
        """Enter a phase (a key of `timeouts.CLOCKS`).

        The clock continues within one step or evaluation.
        """
        self._timer.enter(name, step)
        self._own.progress.update(name, step)

    def progress(self) -> None:
        """Report progress of the current phase (a block was hashed, a file read).

        - Restarts the phase's clock; no rank counts as stuck because it waits for this one.
        - Call it at least once per timeout. It costs a microsecond.
        """
        self._timer.progress()

    def step_done(self, seconds: float) -> None:
        """Record the duration of a step, from which later timeouts are derived.

        Pauses of the whole process do not count.
        """
        self._timer.step_done(seconds)

    def saving(self, active: bool) -> None:
        """Begin or end a background save, which has its own timeout."""
        self._timer.saving(active)

    def connection_lost(self, error: BaseException) -> str:
        """Find the dead rank after a collective raised `error`, within about 2 s.

        Returns the message to print, "" when another rank prints it. Then exit with 1 and no
        further collective (`os._exit`: gloo's threads abort at a normal exit).
        """
        if not self._running:
            return f"rank {self._own.member.rank} lost its connection: {_first_line(error)}"
        if self._own.ending_since is not None:
            # The watchdog is already diagnosing and will end the process.
            time.sleep(2 * DIAGNOSIS_SECONDS)
            return ""
        self._own.ending_since = time.monotonic()
        self._own.set_state("leaving")
        return self._diagnosis.connection_lost(self._own.record(), _first_line(error))

    def close(self, problem: str = "", stopped: str = "", code: int = 0) -> None:
        """Stop the watchdog; no effect when not started.

        `problem` is the reason why this rank exits, which the other ranks then report. If it ends
        with `code` EXIT_USAGE it says that itself, and they end like it (`refusal`). `stopped` is
        the request on which it leaves a start, which is no failure (`another_stopped`).
        """
        if not self._running:
            return

        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=2.0)

        if stopped:
            self._own.set_state("closed", STOPPED + stopped)
        elif self._own.state != "leaving":
            self._own.set_state("failed" if problem else "closed", problem, code)

        self._running = False
        self._own.close()

    def another_stopped(self) -> str:
        """Return which other rank has left this start on request, and why, by its heartbeat.

        As in "SIGUSR1 on rank 1"; "" if none has.
        """
        for one in self._others():
            if one.state == "closed" and one.problem.startswith(STOPPED):
                request = one.problem.removeprefix(STOPPED)
                return request if " on rank " in request else f"{request} on rank {one.rank}"
        return ""

    def refusal(self) -> str:
        """Return why another rank has refused to go on (exit code 2), which it says itself.

        "" if none has.
        """
        return refusal_of(self._others())

    def _others(self) -> Iterator[Heartbeat]:
        own = self._own.member
        # Without a number, a heartbeat of an earlier start could not be told apart.
        if self._running and self.attempt:
            yield from heartbeats_of(self.directory, own.world_size, self.attempt, own.rank)

    @property
    def attempt(self) -> int:
        """The run's number, set once it is known (0: none yet); the failure report names it."""
        return self._own.attempt

    @attempt.setter
    def attempt(self, attempt: int) -> None:
        self._own.attempt = attempt

    @property
    def recording(self) -> Callable[[], bytes | None]:
        """Returns the last collectives as torch recorded them, JSON; None: there is no record.

        Written beside the stacks when this rank is stuck.
        """
        return self._own.recording

    @recording.setter
    def recording(self, recording: Callable[[], bytes | None]) -> None:
        self._own.recording = recording

    @property
    def cells(self) -> "list[int] | memoryview[int]":
        """Shared integers for `CommTracker.cells`.

        Peers read from them the last collective of a killed rank.
        """
        return self._own.progress.cells


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
