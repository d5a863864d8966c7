"""Stop signals: the handler only records the request, the training loop acts on it between steps.

- The loop reads `requested`, agrees on it with the other ranks, saves and exits.
- During a start there is nothing to save yet, so the first signal ends it at once: the handler
  raises StopAsked in the main thread (`begin_start`, `end_start`). What native code waits for runs
  in a thread, because Python hears no signal meanwhile (`run_hearing`).
- A second Ctrl-C means "now" and raises KeyboardInterrupt. It counts only some time after the one
  before: a terminal sends SIGINT to every process of a launch and the launcher forwards its own
  copy, so each key press arrives twice, and the copy must not interrupt what cleans up.
- Signals that came while the program was imported count (`k2train.early_signals`).
- USR1 and USR2 stop like SIGTERM. Batch systems send them some minutes before a time limit, or on
  preemption.
- SIGHUP of a closed terminal stops too, unless it is already ignored, as under nohup.

Alternatives considered:
- Saving inside the handler: it may run in the middle of a collective or of a write.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self, TypeVar

from k2train import early_signals

T = TypeVar("T")

SIGNALS = early_signals.KEPT
PERSONS_SIGNALS = (signal.SIGINT.name, signal.SIGHUP.name)
"""What a terminal sends: Ctrl-C, and its end. The others are what systems send to make room."""


HEARING_SECONDS = 0.2
FINISHING_STEP = "finishing the step, then saving"
"""What a run does after a signal, unless it is in another phase."""
IF_ALL_THERE = ", unless another process has failed"
"""Follows what is said after a signal of which nobody knows whether it is a request."""


class StopAsked(BaseException):
    """A start was asked to stop; its text is the signal's name.

    No Exception: what goes on after errors must not go on after this.
    """


class StopRequest:
    """Stop request by signal; `requested` is the name of the first signal ("SIGTERM"), else None.

    - `finishing`: what the run does after a signal, for the confirmation.
    - `announce`: confirm the request on stderr.
    - `means_to_save`: whether the signal of that name leads to a save, None if nobody knows. A
      launcher ends what is left of a failed run by a signal, too; that is not confirmed.
    - `echo_seconds`: a SIGINT sooner than this after the first counts as the launcher's copy of it.
    """

    def __init__(
        self,
        echo_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        announce: bool = False,
    ) -> None:
        self.requested: str | None = None
        self.finishing = FINISHING_STEP
        self.announce = announce
        self.means_to_save: Callable[[str], bool | None] = lambda name: True
        self._starting, self._held = False, 0
        self._asking = threading.Lock()
        self._reason = ""
        self._echo_seconds = echo_seconds
        self._clock = clock
        self._last_interrupt: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> Self:
        """Install handlers for all SIGNALS; main thread only, once."""
        assert threading.current_thread() is threading.main_thread(), (
            "signal handlers belong to the main thread"
        )
        assert not self._before, "the handlers are installed already"
        # Ignored by nohup, SIGHUP stays so: the run must survive the closed terminal.
        self._before, came = early_signals.replace(self._handle)
        if came and self.requested is None:
            self.requested = signal.Signals(came[0]).name
            self._last_interrupt = self._clock() if signal.SIGINT in came else None

        return self

    def begin_start(self) -> None:
        """From now on the first signal raises StopAsked in the main thread.

        Raises it at once if a signal has come before.
        """
        self._starting = True
        if self.requested is not None:
            self._starting = False
            raise StopAsked(self.requested)

    def end_start(self) -> None:
        """From now on signals only record their request. Idempotent."""
        self._starting = False

    @property
    def starting(self) -> bool:
        """Whether the next signal raises StopAsked."""
        return self._starting

    def ask(self, reason: str) -> None:
        """Ask to stop a start from another thread; `reason` stands for a signal's name.

        No effect after the start, or once the handlers are restored.
        """
        with self._asking:
            # Without its handler the signal would kill the process.
            if self._starting:
                self._reason = reason
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep a signal that comes inside until the end of the block.

        Blocks may be nested. In other threads, which no signal interrupts, it has no effect.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if not self._held and self._starting and self.requested is not None:
            self._starting = False
            raise StopAsked(self.requested)

    def restore(self) -> None:
        """Restore the previous handlers, and raise StopAsked no more; also when not installed."""
        self._starting = False
        # A thread that asks has sent its signal by now, or sends none.
        with self._asking:
            pass
        for number, before in self._before.items():
            # None: the handler was installed by C code, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.requested is None
        if first:
            self.requested = self._reason or signal.Signals(number).name
            if self.announce:
                self._confirm(self.requested)

        # Only a second Ctrl-C interrupts at once.
        if number == signal.SIGINT:
            now, last = self._clock(), self._last_interrupt
            if last is None or now - last >= self._echo_seconds:
                self._last_interrupt = now
                # What is held back ends the start anyway.
                if last is not None and not self._held:
                    raise KeyboardInterrupt

        if first and self._starting and not self._held:
            # Once: what cleans up after it is not interrupted again.
            self._starting = False
            raise StopAsked(self.requested)

    def _confirm(self, requested: str) -> None:
        """Say what is done now; nothing where a failure, which others report, ends the run."""
        doing = "ending the start"
        if not self._starting:
            saves = self.means_to_save(requested)
            if saves is False:
                return
            doing = self.finishing + ("" if saves else IF_ALL_THERE)
        # Bypass all buffers: the signal may interrupt a write to the same stream.
        os.write(2, f"\nk2train: {requested}: {doing}\n".encode())


def run_hearing(work: Callable[[], T]) -> T:
    """Return `work()`, run in a thread while the main thread hears signals.

    A handler may raise meanwhile. The thread then goes on by itself until the process ends.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        done.set()

    threading.Thread(target=run, name="hearing", daemon=True).start()
    while not done.wait(HEARING_SECONDS):
        continue
    if errors:
        raise errors[0]
    return results[0]
