"""Process supervisor: forward signals to the processes of one machine, kill them after a failure.

- A signal that comes before any process has started ends the launch at once, from its first moment
  on (`k2train.early_signals`).
- Every signal goes to every process, as often as it comes, and is noted before that. The launcher
  waits as long as the processes need to save.
- When a process dies, the others are killed after `GRACE_SECONDS`, even if they are stopped
  (SIGSTOP) and receive no signal. Those that report a running save keep torchrun's 30 seconds.
- A thread does this, woken by the C-level half of Python's signal handling. The main thread may
  wait for other nodes in C++, where no Python handler runs.
- Standard library only.

Alternatives considered:
- torchrun's own stop: it sends SIGTERM and kills after 30 seconds, even in the middle of a save.
- torchrun's own failure handling: it gives the others 30 seconds, although they wait for the dead
  process and cannot finish anything.
"""

import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

from k2train import early_signals
from k2train.errors import EXIT_FAILED, EXIT_STOPPED
from k2train.launch.status import End, ProcessStatus, StatusBoard, has_failed, write_signals
from k2train.processes import descendants

FORWARDED = early_signals.KEPT
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.1


class Supervisor:
    """Forward signals and kill the processes left by a failed start; `log` writes one line.

        with Supervisor(log) as supervisor, supervisor.watching(folder):
            ...                     # processes start, and write their status files in `folder`

    - `first_signal`: name of the first signal, or None.
    - `killed`: ranks that were killed because another one had failed.
    - `alone`: all processes of the job are on this machine, so a SIGTERM before they have started
      is a request. On several machines it looks like the end of a failed job.
    """

    def __init__(
        self,
        log: Callable[[str], None],
        grace_seconds: float = GRACE_SECONDS,
        alone: bool = False,
    ) -> None:
        self.alone = alone
        self.first_signal: str | None = None
        self.killed: set[int] = set()
        self._log, self._grace_seconds = log, grace_seconds
        self._arrived = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._signals: list[int] = []
        self._noted = 0
        self._board: StatusBoard | None = None
        self._signals_sent: dict[int, int] = {}
        self._begun = False
        self._ends: dict[int, End] = {}
        self._failed_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        # Python's C-level handler writes signal numbers here, even while the main thread hangs.
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        # What came since this process began is acted on first. Under nohup SIGHUP stays ignored.
        self._before, came = early_signals.replace(_ignore)
        self._record_signals(bytes(came))
        if self._signals:
            self._abort(None)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread and restore the former signal handlers."""
        self._ended.set()
        self._thread.join()

        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._read_end)
        os.close(self._write_end)

    @contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        """Supervise the processes with status files in `folder` during the with statement."""
        with StatusBoard(folder) as board:
            with self._lock:
                self._board, self._signals_sent, self._noted = board, {}, 0
                self._failed_at, self.killed, self._ends = None, set(), {}
                self._begun = True
            try:
                yield
            finally:
                with self._lock:
                    self._board = None

    def statuses(self) -> dict[int, ProcessStatus]:
        """Return rank -> status of every process that started, while they are supervised."""
        with self._lock:
            return {} if self._board is None else self._board.read()

    def ends(self) -> dict[int, End]:
        """Return rank -> end of every process that has ended by itself, while they are supervised.

        Of one that did not write its exit code it is known when its end was seen.
        """
        with self._lock:
            if self._board is not None:
                self._note_ends(self._board.read())
            return {rank: end for rank, end in self._ends.items() if rank not in self.killed}

    def wait(self, seconds: float) -> bool:
        """Sleep; return True as soon as a signal has arrived."""
        return self._arrived.wait(seconds)

    def _watch(self) -> None:
        while not self._ended.is_set():
            readable, _, _ = select.select([self._read_end], [], [], POLL_SECONDS)
            if readable:
                self._record_signals(os.read(self._read_end, 4096))

            with self._lock:
                if self._board is None:
                    if self._signals and not self._begun:
                        self._abort(None)
                    continue
                statuses = self._board.read()
                self._note_ends(statuses)
                if self._signals and not statuses:
                    self._abort(self._board.folder)
                if len(self._signals) > self._noted:
                    # First: torchrun ends the rest of a failed start by SIGTERM, too.
                    names = (signal.Signals(number).name for number in self._signals)
                    write_signals(self._board.folder, dict.fromkeys(names))
                    self._noted = len(self._signals)
                self._forward(statuses)
                self._kill_leftovers(statuses)

    def _note_ends(self, statuses: dict[int, ProcessStatus]) -> None:
        """Keep the first end of each process; one that torchrun has started again has none."""
        for rank, status in statuses.items():
            if status.is_alive:
                self._ends.pop(rank, None)
            else:
                now = time.monotonic()
                self._ends.setdefault(rank, End(status.code, status.ended_at or now))

    def _record_signals(self, numbers: bytes) -> None:
        """Record arriving signals; those that are not forwarded have handlers of their own."""
        forwarded = [number for number in numbers if number in FORWARDED]
        if forwarded and self.first_signal is None:
            self.first_signal = signal.Signals(forwarded[0]).name
        self._signals += forwarded
        if forwarded:
            self._arrived.set()

    def _forward(self, statuses: dict[int, ProcessStatus]) -> None:
        """Send every signal to every process once, earlier ones also to late processes."""
        for rank, status in statuses.items():
            for number in (
                self._signals[self._signals_sent.get(rank, 0) :] if status.is_alive else ()
            ):
                with suppress(ProcessLookupError):
                    os.kill(status.pid, number)
            self._signals_sent[rank] = len(self._signals)

    def _kill_leftovers(self, statuses: dict[int, ProcessStatus]) -> None:
        failed = [rank for rank, status in statuses.items() if has_failed(status)]
        if not failed:
            return

        # The others first get time to end by themselves.
        now = time.monotonic()
        self._failed_at = now if self._failed_at is None else self._failed_at
        if now - self._failed_at < self._grace_seconds:
            return

        for rank, status in statuses.items():
            if status.is_alive and not status.saving:
                self.killed.add(rank)
                with suppress(ProcessLookupError):
                    os.kill(status.pid, signal.SIGKILL)

    def _abort(self, folder: Path | None) -> None:
        """End a launch before any process has started.

        There is nothing to save. Done in the thread, since the main thread may hang.
        """
        asked = self.alone or self.first_signal != signal.SIGTERM.name
        self._log(
            f"{self.first_signal}: asked to stop before any process had started; nothing was begun"
        )

        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in descendants([os.getpid()]):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + self._grace_seconds
            while descendants([os.getpid()]) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 2)

        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(EXIT_STOPPED if asked else EXIT_FAILED)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Signal handler that does nothing: its presence makes the signal wake the thread."""
