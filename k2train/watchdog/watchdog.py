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
from k2train.watchdog.failure_report import STACKS_SIGNAL, keep_earlier
from k2train.watchdog.heartbeat import (
    Observer,
    Process,
    Record,
    read_record,
    stacks_path,
    state_of,
    this_process,
    write_record,
)
from k2train.watchdog.phase_timer import TICK_SECONDS, PhaseTimer
from k2train.watchdog.shared_progress import PeerProgress, SharedProgress
from k2train.watchdog.timeouts import Timeouts

STOPPED_SECONDS = 10.0
"""How long a rank of this machine may be stopped (SIGSTOP) while this one runs."""
DIAGNOSIS_SECONDS = 8.0
"""How long may pass from then to the end of the process."""

Position = Callable[[], tuple[int, str, str, float]]


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
        say: Callable[[str], None],
        position: Position,
        *,
        facts: Mapping[str, str] | None = None,
        leave: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self.directory, self.rank, self.world_size, self.limits = (
            directory,
            rank,
            world_size,
            limits,
        )
        self.attempt = 0
        self._say, self._position, self._facts, self._leave = (
            say,
            position,
            dict(facts or {}),
            leave,
        )
        self._clock, self._wall = clock, wall
        self._process = this_process()
        self._clocks = PhaseTimer(limits, clock)
        self._beat, self._state, self._problem = 0, "", ""
        self._peers: dict[int, Process] = {}
        self._unknown = set(range(world_size)) - {rank}
        self._dead_since: float | None = None
        self._stopped_since: float | None = None
        self._lost_since: float | None = None
        self._observer: Observer | None = None
        self._others_went_on = -math.inf
        self._live, self._held = SharedProgress(), PeerProgress(self._process)
        self._inquest = Diagnosis(directory, world_size, limits, self._process, self._held, clock)
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to watch; makes the directory. Without `heartbeat_seconds` there is no watch. Raises OSError."""
        if self.limits.heartbeat_seconds <= 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            # Whoever wants to know how the start before ended has read it by now.
            keep_earlier(self.directory)
        # Appended to: a run that starts again by itself must not take away what its end pointed to.
        self._stacks = stacks_path(self.directory, self.rank).open("a")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        with contextlib.suppress(OSError):
            self._write()
        for name, body in (("beats", self._beats), ("clock", self._watch_clock)):
            thread = threading.Thread(target=body, name=f"watch-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def phase(self, name: str, step: int) -> None:
        """The main thread goes on to a phase (a key of `limits.CLOCKS`). A clock goes on within one step or evaluation."""
        self._clocks.enter(name, step)
        self._live.put(name, step)

    def progress(self) -> None:
        """The work of this phase gets on (a block was hashed, a file read): its clock begins again, and no rank counts as
        stuck because it waits for this one. To be called at least once in the phase's limit; costs a microsecond."""
        self._clocks.progress()

    def step_done(self, seconds: float) -> None:
        """A step took so long: what the limit of the next ones is made of. Pauses of the whole process do not count."""
        self._clocks.step_done(seconds)

    def saving(self, active: bool) -> None:
        """A save in the background begins or ends; it has a limit of its own."""
        self._clocks.saving(active)

    def lost(self, error: BaseException) -> str:
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
        return self._inquest.lost(self.record(), _first_line(error))

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
        self._live.close()

    @property
    def cells(self) -> "list[int] | memoryview[int]":
        """Where `CommTracker.cells` is to point, so that others know the number of the last collective of a killed rank."""
        return self._live.cells

    def record(self) -> Record:
        """Where this rank is now."""
        place, (count, current, last, _) = self._clocks.place, self._position()
        return Record(
            self.rank,
            self.world_size,
            self._process,
            self._beat,
            place.phase,
            place.step,
            self._clocks.elapsed(),
            count,
            current,
            last,
            self._state,
            self._problem,
            self.attempt,
            self._live.descriptor,
            self._facts,
            datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="seconds"),
            self._clocks.progress_count,
        )

    def _set_state(self, state: str) -> None:
        self._state = state
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        with self._writing:
            self._beat += 1
            write_record(self.directory, self.record())

    # -- the thread that touches files

    def _beats(self) -> None:
        written, place = self._clock(), self._clocks.place
        while not self._ended.wait(min(TICK_SECONDS, self.limits.heartbeat_seconds)):
            now = self._clock()
            lasting = (
                self._clocks.place != place and now - self._clocks.place.changed >= TICK_SECONDS
            )
            if self._unknown and self._lost_since is None:
                with contextlib.suppress(OSError):
                    self._meet()
            if now - written < self.limits.heartbeat_seconds and not lasting:
                continue
            written, place = now, self._clocks.place
            # Written by C code should this thread not come round again; renewed each time.
            faulthandler.dump_traceback_later(max(self._clocks.limit(), 1.0), file=self._stacks)
            with contextlib.suppress(OSError):
                self._write()
                self._look_around()

    def _look_around(self) -> None:
        """Whether the others gave the run up, and whether all ranks of this machine live."""
        if self._lost_since is None and self._inquest.given():
            self._dump("another rank ended the run")
            self._exit()
        states = {rank: state_of(process, self._process) for rank, process in self._peers.items()}
        if "stopped" not in states.values():
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = self._clock()
        for rank, state in states.items():
            if self._dead_since is None and state == "gone":
                record = read_record(self.directory, rank)
                if record is not None and (record.at_work or record.state == "failed"):
                    self._dead_since = self._clock()

    def _meet(self) -> None:
        """Find those ranks of this machine that have come up since."""
        for rank in sorted(self._unknown):
            record = read_record(self.directory, rank)
            # A closed record is of an earlier start: the rank has not come up in this one.
            if (
                record is not None
                and record.at_work
                and state_of(record.process, self._process) != "gone"
            ):
                self._unknown.discard(rank)
                if state_of(record.process, self._process):
                    self._peers[rank] = record.process
                    self._held.hold(record)

    # -- the thread that has the clock

    def _watch_clock(self) -> None:
        self._clocks.tick()
        while not self._ended.wait(TICK_SECONDS):
            if self._clocks.tick():
                self._observer = self._stopped_since = None
            now = self._clock()
            if self._lost_since is not None:
                if now - self._lost_since > DIAGNOSIS_SECONDS:
                    self._exit()
            elif self._dead_since is not None:
                if now - self._dead_since > TURN_SECONDS:
                    self._end(self._on_death)
            else:
                self._check_limits(now)

    def _check_limits(self, now: float) -> None:
        over = self._clocks.over()
        if (since := self._stopped_since) is not None:
            # Wherever the others are: a save may take half an hour, and nobody saves who is stopped.
            over = max(over, now - since - STOPPED_SECONDS)
        look = self.limits.silent_after + 2 * TICK_SECONDS
        if over < -look:
            self._observer = None
        elif self._observer is None:
            self._observer = observer = self._inquest.observer()
            threading.Thread(
                target=self._observe, args=(observer,), name="watch-look", daemon=True
            ).start()
        if over < 0 or self._observer is None or now - self._observer.began < look:
            return
        if now - self._others_went_on < look:
            # Looked at anew: what moved long ago says nothing of the moment when they no longer go on.
            self._observer = None
        else:
            self._end(self._on_stall)

    def _observe(self, observer: Observer) -> None:
        pause = max(TICK_SECONDS, self.world_size / RANKS_A_SECOND)
        while self._observer is observer and not self._ended.wait(pause):
            observer.sample()
            if self._inquest.getting_on(observer):
                self._others_went_on = self._clock()

    # -- the end

    def _end(self, inquest: Callable[[], None]) -> None:
        """Hold the inquest, but not for longer than is given to it, and end this process."""
        self._lost_since = self._clock()
        holding = threading.Thread(target=inquest, name="watch-inquest", daemon=True)
        holding.start()
        holding.join(DIAGNOSIS_SECONDS)
        if holding.is_alive():
            self._say(
                f"{self.record().who()} is stuck: {self.record().where()}; {self.directory} does not answer"
            )
        self._exit()

    def _on_stall(self) -> None:
        observer = self._observer
        assert observer is not None, "a stall is judged from what was observed"
        self._set_state("stalled")
        self._dump("over the limit")
        self._inquest.stalled(self.record(), observer, self._say)
        self._set_state("leaving")
        _flush()

    def _on_death(self) -> None:
        self._set_state("leaving")
        told = self._inquest.lost(self.record(), "")
        if told:
            self._say(told)
        _flush()

    def _dump(self, why: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            os.write(
                self._stacks.fileno(),
                f"{self.record().who()}, {self.record().where()}: {why}\n".encode(),
            )
            faulthandler.dump_traceback(self._stacks, all_threads=True)

    def _exit(self) -> None:
        self._leave(EXIT_FAILED)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
