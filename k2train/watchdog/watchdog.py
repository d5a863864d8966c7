"""Watchdog of one rank: writes heartbeats, detects hung or dead ranks, ends the run.

- The run ends with one message, from one rank.
- Two daemon threads. One touches files: it writes the heartbeat and checks that ranks of this
  machine are alive and that no failure report exists.
- The other compares phases with their timeouts and never touches a file, so a hanging file system
  cannot stop it. After a timeout it observes the others for a few seconds and then ends this
  process, whatever the main thread is doing.
- Only monotonic clocks decide. Time in which the whole process was stopped (a debugger, a suspended
  job) does not count.
- A main thread that holds Python's lock forever stops both threads, and the heartbeat stops. The
  other ranks see that, and those on the same machine kill the process.
- A world of one has no such peer: it hangs on, and STACKS_SIGNAL sent to it writes its stacks.

Alternatives considered: `faulthandler.dump_traceback_later`, which needs no peer. After a pause of
the process (Ctrl-Z, a suspended job) it reads the frames of threads that run, and crashes a healthy
run: about one dump in 12 in code full of generators.
"""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from k2train.errors import EXIT_FAILED
from k2train.watchdog.diagnosis import RANKS_A_SECOND, TURN_SECONDS, Diagnosis
from k2train.watchdog.failure_report import STACKS_SIGNAL, archive_report
from k2train.watchdog.heartbeat import (
    Heartbeat,
    Observer,
    Process,
    process_state,
    read_heartbeat,
    stacks_path,
    this_process,
    write_heartbeat,
)
from k2train.watchdog.phase_timer import TICK_SECONDS, PhaseTimer
from k2train.watchdog.shared_progress import PeerProgress, SharedProgress
from k2train.watchdog.timeouts import Timeouts

STOPPED_SECONDS = 10.0
"""Time for which a rank of this machine may be stopped (SIGSTOP) while this one runs."""
DIAGNOSIS_SECONDS = 8.0
"""Longest time from the detection to the end of the process."""

CommPosition = Callable[[], tuple[int, str, str, float]]


class Watchdog:
    """Watchdog of one rank.

    - Call `start`, then `phase` during the run, `connection_lost` when a collective raised, and
      `close` at the end in every case.
    - `attempt` is set once it is known: the failure report names it (0: the run had no number yet).
    - `log` prints a message from a thread while the main thread hangs. It must not take a lock that
      the main thread may hold (os.write does not).
    - `comm_position` returns (collectives begun, the current one, the last one, blocked seconds).
    - `facts` are texts for people, such as the SLURM job. `exit_process` ends the process.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        limits: Timeouts,
        log: Callable[[str], None],
        comm_position: CommPosition,
        *,
        facts: Mapping[str, str] | None = None,
        exit_process: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self.directory, self.limits = directory, limits
        self.rank, self.world_size = rank, world_size
        self.attempt = 0
        self._log, self._comm_position = log, comm_position
        self._facts = dict(facts or {})
        self._exit_process = exit_process
        self._clock, self._wall = clock, wall
        self._process = this_process()
        self._timer = PhaseTimer(limits, clock)
        self._beat_count, self._state, self._problem = 0, "", ""
        self._peers: dict[int, Process] = {}
        self._unseen_ranks = set(range(world_size)) - {rank}
        self._dead_since: float | None = None
        self._stopped_since: float | None = None
        self._lost_since: float | None = None
        self._observer: Observer | None = None
        self._others_progressed_at = -math.inf
        self._own_progress, self._peer_progress = SharedProgress(), PeerProgress(self._process)
        self._diagnosis = Diagnosis(
            directory, world_size, limits, self._process, self._peer_progress, clock
        )
        self._ended = threading.Event()
        self._write_lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads and create the directory. Raises OSError.

        Without `heartbeat_seconds` there is no watchdog.
        """
        if self.limits.heartbeat_seconds <= 0:
            return

        self.directory.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            # Readers of the earlier start's report have read it by now.
            archive_report(self.directory)

        # Append: a run that restarts by itself must keep the stacks that its last report pointed
        # to.
        self._stacks = stacks_path(self.directory, self.rank).open("a")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        with contextlib.suppress(OSError):
            self._write()

        for name, body in (("heartbeat", self._heartbeat_loop), ("timeout", self._timeout_loop)):
            thread = threading.Thread(target=body, name=f"watch-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def phase(self, name: str, step: int) -> None:
        """Enter a phase (a key of `timeouts.CLOCKS`).

        The clock continues within one step or evaluation.
        """
        self._timer.enter(name, step)
        self._own_progress.update(name, step)

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
        if not self._threads:
            return f"rank {self.rank} lost its connection: {_first_line(error)}"
        if self._lost_since is not None:
            # The watchdog is already diagnosing and will end the process.
            time.sleep(2 * DIAGNOSIS_SECONDS)
            return ""
        self._lost_since = self._clock()
        self._set_state("leaving")
        return self._diagnosis.connection_lost(self.record(), _first_line(error))

    def close(self, problem: str = "") -> None:
        """Stop the watchdog; no effect when not started.

        `problem` is the reason why this rank exits, which the other ranks then report.
        """
        if not self._threads:
            return

        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=2.0)

        if self._state != "leaving":
            self._problem = problem
            self._set_state("failed" if problem else "closed")

        self._threads = []
        faulthandler.unregister(STACKS_SIGNAL)
        self._stacks.close()
        self._own_progress.close()

    @property
    def cells(self) -> "list[int] | memoryview[int]":
        """Shared integers for `CommTracker.cells`.

        Peers read from them the last collective of a killed rank.
        """
        return self._own_progress.cells

    def record(self) -> Heartbeat:
        """Current heartbeat of this rank."""
        phase, (count, current, last, _) = self._timer.current, self._comm_position()
        return Heartbeat(
            self.rank,
            self.world_size,
            self._process,
            self._beat_count,
            phase.name,
            phase.step,
            self._timer.elapsed(),
            count,
            current,
            last,
            self._state,
            self._problem,
            self.attempt,
            self._own_progress.descriptor,
            self._facts,
            datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="seconds"),
            self._timer.progress_count,
        )

    def _set_state(self, state: str) -> None:
        self._state = state
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        with self._write_lock:
            self._beat_count += 1
            write_heartbeat(self.directory, self.record())

    # The thread that touches files.

    def _heartbeat_loop(self) -> None:
        written, written_phase = self._clock(), self._timer.current
        while not self._ended.wait(min(TICK_SECONDS, self.limits.heartbeat_seconds)):
            now = self._clock()
            # A phase that lasts is written at once, one that passes quickly is not worth a write.
            lasting = (
                self._timer.current != written_phase
                and now - self._timer.current.changed >= TICK_SECONDS
            )
            if self._unseen_ranks and self._lost_since is None:
                with contextlib.suppress(OSError):
                    self._find_peers()

            if now - written < self.limits.heartbeat_seconds and not lasting:
                continue

            written, written_phase = now, self._timer.current
            with contextlib.suppress(OSError):
                self._write()
                self._check_peers()

    def _check_peers(self) -> None:
        """Exit when another rank reported a failure; note dead or stopped ranks of this machine."""
        if self._lost_since is None and self._diagnosis.is_reported():
            self._dump("another rank ended the run")
            self._exit()

        states = {
            rank: process_state(process, self._process) for rank, process in self._peers.items()
        }
        if "stopped" not in states.values():
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = self._clock()

        for rank, state in states.items():
            if self._dead_since is None and state == "gone":
                record = read_heartbeat(self.directory, rank)
                if record is not None and (record.at_work or record.state == "failed"):
                    self._dead_since = self._clock()

    def _find_peers(self) -> None:
        """Find ranks of this machine that have started since."""
        for rank in sorted(self._unseen_ranks):
            record = read_heartbeat(self.directory, rank)
            # A closed record belongs to an earlier start: the rank has not started in this one.
            if (
                record is not None
                and record.at_work
                and process_state(record.process, self._process) != "gone"
            ):
                self._unseen_ranks.discard(rank)
                if process_state(record.process, self._process):
                    self._peers[rank] = record.process
                    self._peer_progress.attach(record)

    # The thread that checks timeouts.

    def _timeout_loop(self) -> None:
        self._timer.tick()
        while not self._ended.wait(TICK_SECONDS):
            if self._timer.tick():
                # After a pause of this process, earlier observations prove nothing.
                self._observer = self._stopped_since = None

            now = self._clock()
            if self._lost_since is not None:
                if now - self._lost_since > DIAGNOSIS_SECONDS:
                    self._exit()
            elif self._dead_since is not None:
                if now - self._dead_since > TURN_SECONDS:
                    self._end_run(self._handle_death)
            else:
                self._check_limits(now)

    def _check_limits(self, now: float) -> None:
        overrun = self._timer.overrun()
        if (since := self._stopped_since) is not None:
            # Checked in every phase: a save may take half an hour, but a stopped rank does not
            # save.
            overrun = max(overrun, now - since - STOPPED_SECONDS)

        # Observe the others for as long as it takes to tell a silent rank from a live one.
        look = self.limits.silent_after + 2 * TICK_SECONDS
        if overrun < -look:
            self._observer = None
        elif self._observer is None:
            self._observer = observer = self._diagnosis.observer()
            threading.Thread(
                target=self._observe, args=(observer,), name="watch-observe", daemon=True
            ).start()

        if overrun < 0 or self._observer is None or now - self._observer.began < look:
            return

        if now - self._others_progressed_at < look:
            # Observe again: progress of long ago does not show when the others stopped.
            self._observer = None
        else:
            self._end_run(self._handle_stall)

    def _observe(self, observer: Observer) -> None:
        pause = max(TICK_SECONDS, self.world_size / RANKS_A_SECOND)
        while self._observer is observer and not self._ended.wait(pause):
            observer.sample()
            if self._diagnosis.others_progress(observer):
                self._others_progressed_at = self._clock()

    # The end of the run.

    def _end_run(self, diagnose: Callable[[], None]) -> None:
        """Run the diagnosis within its time limit, then end this process."""
        self._lost_since = self._clock()
        # In a thread of its own, because a hanging file system must not stop this one.
        thread = threading.Thread(target=diagnose, name="watch-diagnosis", daemon=True)
        thread.start()
        thread.join(DIAGNOSIS_SECONDS)

        if thread.is_alive():
            self._log(
                f"{self.record().rank_text()} is stuck: {self.record().phase_text()}; "
                f"{self.directory} does not answer"
            )

        self._exit()

    def _handle_stall(self) -> None:
        observer = self._observer
        assert observer is not None, "a stall is judged from what was observed"
        self._set_state("stalled")
        self._dump("over the limit")
        self._diagnosis.stalled(self.record(), observer, self._log)
        self._set_state("leaving")
        _flush()

    def _handle_death(self) -> None:
        self._set_state("leaving")
        message = self._diagnosis.connection_lost(self.record(), "")
        if message:
            self._log(message)
        _flush()

    def _dump(self, why: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.write(
                self._stacks.fileno(),
                f"{self.record().rank_text()}, {self.record().phase_text()}: {why}\n".encode(),
            )
            faulthandler.dump_traceback(self._stacks, all_threads=True)

    def _exit(self) -> None:
        self._exit_process(EXIT_FAILED)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
