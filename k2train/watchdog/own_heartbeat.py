"""Own heartbeat: what this rank reports about itself, for all threads of the watchdog to write.

- Phase and step come from the timer, the collective from the communication tracker.
- The Python stacks of this process go to a file beside it: on STACKS_SIGNAL, and before it exits.
- So do the last collectives as torch recorded them, after the report of a rank that is stuck.
"""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from k2train.processes import this_process
from k2train.watchdog.failure_report import STACKS_SIGNAL
from k2train.watchdog.heartbeat import Heartbeat, recording_path, stacks_path, write_heartbeat
from k2train.watchdog.phase_timer import PhaseTimer
from k2train.watchdog.shared_progress import SharedProgress

CommPosition = Callable[[], tuple[int, str, str, float]]
"""Returns (collectives begun, the current one, the last one, blocked seconds)."""


RECORDING_SECONDS = 2.0
"""Longest wait for the flight recorder."""
HELD_SECONDS = 3 * RECORDING_SECONDS
"""Time after which the kernel ends a process whose flight recorder holds Python's lock."""
_TIMER = threading.Lock()
"""Held while that end is timed: a process has one timer, which two would set for each other."""


@dataclass(frozen=True)
class Member:
    """Which rank of how many this is; `facts` are texts for people, such as the SLURM job."""

    rank: int
    world_size: int
    facts: Mapping[str, str] = field(default_factory=dict)


class OwnHeartbeat:
    """Heartbeat of this rank in `directory`.

    - `attempt` is 0 until the run has a number.
    - `ending_since` is set, by `time.monotonic`, when this rank begins to leave a broken run.
    """

    def __init__(
        self, directory: Path, member: Member, timer: PhaseTimer, comm_position: CommPosition
    ):
        self.directory, self.member, self.timer = directory, member, timer
        self._comm_position = comm_position
        self.process = this_process()
        self.progress = SharedProgress()
        self.attempt = 0
        self.ending_since: float | None = None
        self.state = ""
        self.recording: Callable[[], bytes | None] = lambda: None
        """Returns the last collectives of this process, JSON; None where nothing recorded them."""
        self._beat_count, self._problem, self._code = 0, "", 0
        self._write_lock = threading.Lock()

    def open(self) -> None:
        """Open the file of stacks and write the first heartbeat. Raises OSError."""
        # Append: a run that restarts by itself must keep the stacks that its last report pointed
        # to.
        self._stacks = stacks_path(self.directory, self.member.rank).open("a")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        with contextlib.suppress(OSError):
            self.write()

    def close(self) -> None:
        """Close the file of stacks and stop sharing the progress. The heartbeat stays."""
        faulthandler.unregister(STACKS_SIGNAL)
        self._stacks.close()
        self.progress.close()

    def record(self) -> Heartbeat:
        """Current heartbeat."""
        phase, (count, current, last, _) = self.timer.current, self._comm_position()
        return Heartbeat(
            self.member.rank,
            self.member.world_size,
            self.process,
            self._beat_count,
            phase.name,
            phase.step,
            self.timer.elapsed(),
            count,
            current,
            last,
            self.state,
            self._problem,
            self.attempt,
            self.progress.descriptor,
            self.member.facts,
            datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
            self.timer.progress_count,
            self._code,
        )

    def write(self) -> None:
        """Write the heartbeat. Raises OSError."""
        with self._write_lock:
            self._beat_count += 1
            write_heartbeat(self.directory, self.record())

    def set_state(self, state: str, problem: str = "", code: int = 0) -> None:
        """Write a new state; `problem` is the reason of `failed`, `code` the exit code to come."""
        self.state, self._problem, self._code = state, problem, code
        with contextlib.suppress(OSError):
            self.write()

    def dump(self, why: str) -> None:
        """Append the stacks of all threads, under a line that says why."""
        record = self.record()
        with contextlib.suppress(OSError, ValueError):
            os.write(
                self._stacks.fileno(),
                f"{record.rank_text()}, {record.phase_text()}: {why}\n".encode(),
            )
            faulthandler.dump_traceback(self._stacks, all_threads=True)

    def dump_recording(self) -> None:
        """Write the recorded collectives to a file of this rank, if there are any.

        In a thread of its own, for `RECORDING_SECONDS` at most: the recorder's lock may be held by
        the thread that hangs. Called last before the process ends: torch's recorder waits for that
        lock with Python's own lock held, so that no thread of this process runs any more. Then the
        kernel ends it, by SIGALRM.
        """
        thread = threading.Thread(target=self._dump_recording, name="watch-recording", daemon=True)
        with _TIMER:
            before = signal.setitimer(signal.ITIMER_REAL, HELD_SECONDS)
            # Where no thread can be made, the report has no recording.
            with contextlib.suppress(RuntimeError, MemoryError):
                thread.start()
                thread.join(RECORDING_SECONDS)
            if not thread.is_alive():
                signal.setitimer(signal.ITIMER_REAL, *before)

    def _dump_recording(self) -> None:
        content = self.recording()
        if content is None:
            return
        path = recording_path(self.directory, self.member.rank)
        with contextlib.suppress(OSError):
            path.write_bytes(content)
