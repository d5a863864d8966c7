"""Timeout thread: the thread of the watchdog that ends a run that hangs, or lost a rank.

- It compares phases with their timeouts and never touches a file, so a hanging file system cannot
  stop it.
- After a timeout it observes the others for a few seconds and then ends this process, whatever the
  main thread is doing.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable

from k2train.errors import EXIT_FAILED, EXIT_USAGE
from k2train.retry import is_waiting
from k2train.watchdog.diagnosis import RANKS_A_SECOND, TURN_SECONDS, Diagnosis
from k2train.watchdog.heartbeat import Observer, heartbeats_of, refusal_of
from k2train.watchdog.heartbeat_thread import HeartbeatThread
from k2train.watchdog.own_heartbeat import OwnHeartbeat
from k2train.watchdog.phase_timer import TICK_SECONDS

STOPPED_SECONDS = 10.0
"""Time for which a rank of this machine may be stopped (SIGSTOP) while this one runs."""
DIAGNOSIS_SECONDS = 8.0
"""Longest time from the detection to the end of the process."""


class TimeoutThread(threading.Thread):
    """Checks timeouts until `ended`; `heartbeats` knows of dead and stopped ranks.

    `log` prints a message while the main thread hangs. `exit_process` ends the process.
    """

    def __init__(
        self,
        own: OwnHeartbeat,
        diagnosis: Diagnosis,
        heartbeats: HeartbeatThread,
        ended: threading.Event,
        log: Callable[[str], None],
        exit_process: Callable[[int], object],
    ):
        super().__init__(name="watch-timeout", daemon=True)
        self._own, self._diagnosis, self._heartbeats = own, diagnosis, heartbeats
        self._ended, self._log, self._exit_process = ended, log, exit_process
        self._code = EXIT_FAILED
        self._observer: Observer | None = None
        self._others_progressed_at = -math.inf

    def run(self) -> None:
        """Check every TICK_SECONDS whether this rank must end the run."""
        timer = self._own.timer
        timer.tick()
        while not self._ended.wait(TICK_SECONDS):
            if timer.tick():
                # After a pause of this process, earlier observations prove nothing.
                self._observer = self._heartbeats.stopped_since = None

            now = time.monotonic()
            if (ending_since := self._own.ending_since) is not None:
                if now - ending_since > DIAGNOSIS_SECONDS:
                    self._exit_process(EXIT_FAILED)
            elif (dead_since := self._heartbeats.dead_since) is not None:
                if now - dead_since > TURN_SECONDS:
                    self._end_run(self._handle_death)
            else:
                self._check_limits(now)

    def _check_limits(self, now: float) -> None:
        if is_waiting():
            # A file server that does not answer for a moment: no rank is stuck.
            self._own.timer.progress()
        overrun = self._own.timer.overrun()
        if (since := self._heartbeats.stopped_since) is not None:
            # Checked in every phase: a save may take half an hour, but a stopped rank does not
            # save.
            overrun = max(overrun, now - since - STOPPED_SECONDS)

        # Observe the others for as long as it takes to tell a silent rank from a live one.
        look = self._diagnosis.limits.silent_after + 2 * TICK_SECONDS
        if overrun < -look:
            self._observer = None
        elif self._observer is None:
            self._observer = observer = self._diagnosis.observer()
            thread = threading.Thread(
                target=self._observe, args=(observer,), name="watch-observe", daemon=True
            )
            try:
                thread.start()
            except (RuntimeError, MemoryError):
                # A limit of threads or memory: tried again at the next tick.
                self._observer = None

        if overrun < 0 or self._observer is None or now - self._observer.began < look:
            return

        if now - self._others_progressed_at < look:
            # Observe again: progress of long ago does not show when the others stopped.
            self._observer = None
        else:
            self._end_run(self._handle_stall)

    def _observe(self, observer: Observer) -> None:
        pause = max(TICK_SECONDS, self._own.member.world_size / RANKS_A_SECOND)
        while self._observer is observer and not self._ended.wait(pause):
            observer.sample()
            if self._diagnosis.others_progress(observer):
                self._others_progressed_at = time.monotonic()

    def _end_run(self, diagnose: Callable[[], None]) -> None:
        """Run the diagnosis within its time limit, then end this process."""
        self._own.ending_since = time.monotonic()
        # In a thread of its own, because a hanging file system must not stop this one.
        thread = threading.Thread(target=diagnose, name="watch-diagnosis", daemon=True)
        # Where no thread can be made, it ends without a diagnosis.
        with contextlib.suppress(RuntimeError, MemoryError):
            thread.start()
            thread.join(DIAGNOSIS_SECONDS)

        if thread.is_alive():
            record = self._own.record()
            self._log(
                f"{record.rank_text()} is stuck: {record.phase_text()}; "
                f"{self._own.directory} does not answer"
            )

        self._exit_process(self._code)

    def _handle_stall(self) -> None:
        observer = self._observer
        assert observer is not None, "a stall is judged from what was observed"
        self._own.set_state("stalled")
        self._own.dump("over the limit")
        self._diagnosis.stalled(self._own.record(), observer, self._log, self._own.dump_recording)
        self._own.set_state("leaving")
        _flush()

    def _handle_death(self) -> None:
        own = self._own.member
        others = heartbeats_of(self._own.directory, own.world_size, self._own.attempt, own.rank)
        self._own.set_state("leaving")
        if self._own.attempt and refusal_of(others):
            # That rank tells the mistake, and all end with its exit code.
            self._code = EXIT_USAGE
            return
        message = self._diagnosis.connection_lost(self._own.record(), "")
        if message:
            self._log(message)
        _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
