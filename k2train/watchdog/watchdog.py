"""The watch of one rank: says where it is, sees when it hangs or another is lost, and ends the run with one clear line.

Two daemon threads. One touches files: it writes the heartbeat, and looks whether ranks of this machine still live and
whether a verdict was given. The other has the clock and never touches a file, so a file system that hangs cannot stop it:
when a step, a save or an evaluation exceeds its limit it gives the others a few seconds to be looked at, and then ends this
process, whatever the main thread is doing. Only monotonic clocks decide; time in which the whole process was stopped (a
debugger, a suspended job) does not count.

A main thread that holds Python's lock for ever stops both threads; the heartbeat then stands still, the other ranks see it,
and the ones of the same machine end the process. A world of one has nobody to do that; its stacks are written all the same.
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
"""How long a rank of this machine may be stopped (SIGSTOP) while this one runs."""
DIAGNOSIS_SECONDS = 8.0
"""How long may pass from then to the end of the process."""

CommPosition = Callable[[], tuple[int, str, str, float]]


class Watchdog:
    """`start`, then `phase` as the run goes on; `lost` when a collective raised; `close` at the end, whatever end.

    `attempt` is to be set as soon as it is known: a verdict names it (0: the record of the run was not open yet).

    `say` writes a line to people from a thread while the main thread hangs: it must not take a lock that the main thread
    may hold (os.write does not). `position` gives (collectives begun, the one under way, the last one, blocked seconds).
    `facts` are texts for people, such as the SLURM job; `leave` ends the process.
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
        """Begin to watch; makes the directory. Without `heartbeat_seconds` there is no watch. Raises OSError."""
        if self.limits.heartbeat_seconds <= 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            # Whoever wants to know how the start before ended has read it by now.
            archive_report(self.directory)
        # Appended to: a run that starts again by itself must not take away what its end pointed to.
        self._stacks = stacks_path(self.directory, self.rank).open("a")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        with contextlib.suppress(OSError):
            self._write()
        for name, body in (("beats", self._heartbeat_loop), ("clock", self._timeout_loop)):
            thread = threading.Thread(target=body, name=f"watch-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def phase(self, name: str, step: int) -> None:
        """The main thread goes on to a phase (a key of `limits.CLOCKS`). A clock goes on within one step or evaluation."""
        self._timer.enter(name, step)
        self._own_progress.update(name, step)

    def progress(self) -> None:
        """The work of this phase gets on (a block was hashed, a file read): its clock begins again, and no rank counts as
        stuck because it waits for this one. To be called at least once in the phase's limit; costs a microsecond."""
        self._timer.progress()

    def step_done(self, seconds: float) -> None:
        """A step took so long: what the limit of the next ones is made of. Pauses of the whole process do not count."""
        self._timer.step_done(seconds)

    def saving(self, active: bool) -> None:
        """A save in the background begins or ends; it has a limit of its own."""
        self._timer.saving(active)

    def connection_lost(self, error: BaseException) -> str:
        """A collective raised `error`: look for who died, for about 2 s. The line to print; "" where another rank prints it.

        Exit with 1 afterwards, without any further collective (`os._exit`: gloo's threads abort at a usual exit).
        """
        if not self._threads:
            return f"rank {self.rank} lost its connection: {_first_line(error)}"
        if self._lost_since is not None:
            # The watch is at it already, and ends the process.
            time.sleep(2 * DIAGNOSIS_SECONDS)
            return ""
        self._lost_since = self._clock()
        self._set_state("leaving")
        return self._diagnosis.connection_lost(self.record(), _first_line(error))

    def close(self, problem: str = "") -> None:
        """The rank leaves by itself; `problem`: because of this, which the others then tell. Harmless when not started."""
        if not self._threads:
            return
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=2.0)
        faulthandler.cancel_dump_traceback_later()
        if self._state != "leaving":
            self._problem = problem
            self._set_state("failed" if problem else "closed")
        self._threads = []
        faulthandler.unregister(STACKS_SIGNAL)
        self._stacks.close()
        self._own_progress.close()

    @property
    def cells(self) -> "list[int] | memoryview[int]":
        """Where `CommTracker.cells` is to point, so that others know the number of the last collective of a killed rank."""
        return self._own_progress.cells

    def record(self) -> Heartbeat:
        """Where this rank is now."""
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

    # -- the thread that touches files

    def _heartbeat_loop(self) -> None:
        written, written_phase = self._clock(), self._timer.current
        while not self._ended.wait(min(TICK_SECONDS, self.limits.heartbeat_seconds)):
            now = self._clock()
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
            # Written by C code should this thread not come round again; renewed each time.
            faulthandler.dump_traceback_later(max(self._timer.limit(), 1.0), file=self._stacks)
            with contextlib.suppress(OSError):
                self._write()
                self._check_peers()

    def _check_peers(self) -> None:
        """Whether the others gave the run up, and whether all ranks of this machine live."""
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
        """Find those ranks of this machine that have come up since."""
        for rank in sorted(self._unseen_ranks):
            record = read_heartbeat(self.directory, rank)
            # A closed record is of an earlier start: the rank has not come up in this one.
            if (
                record is not None
                and record.at_work
                and process_state(record.process, self._process) != "gone"
            ):
                self._unseen_ranks.discard(rank)
                if process_state(record.process, self._process):
                    self._peers[rank] = record.process
                    self._peer_progress.attach(record)

    # -- the thread that has the clock

    def _timeout_loop(self) -> None:
        self._timer.tick()
        while not self._ended.wait(TICK_SECONDS):
            if self._timer.tick():
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
            # Wherever the others are: a save may take half an hour, and nobody saves who is stopped.
            overrun = max(overrun, now - since - STOPPED_SECONDS)
        look = self.limits.silent_after + 2 * TICK_SECONDS
        if overrun < -look:
            self._observer = None
        elif self._observer is None:
            self._observer = observer = self._diagnosis.observer()
            threading.Thread(
                target=self._observe, args=(observer,), name="watch-look", daemon=True
            ).start()
        if overrun < 0 or self._observer is None or now - self._observer.began < look:
            return
        if now - self._others_progressed_at < look:
            # Looked at anew: what moved long ago says nothing of the moment when they no longer go on.
            self._observer = None
        else:
            self._end_run(self._handle_stall)

    def _observe(self, observer: Observer) -> None:
        pause = max(TICK_SECONDS, self.world_size / RANKS_A_SECOND)
        while self._observer is observer and not self._ended.wait(pause):
            observer.sample()
            if self._diagnosis.others_progress(observer):
                self._others_progressed_at = self._clock()

    # -- the end

    def _end_run(self, diagnose: Callable[[], None]) -> None:
        """Hold the inquest, but not for longer than is given to it, and end this process."""
        self._lost_since = self._clock()
        thread = threading.Thread(target=diagnose, name="watch-inquest", daemon=True)
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
