"""Stop signals: the handler only records the request, the training loop acts on it between steps.

- The loop reads `requested`, agrees on it with the other ranks, saves and exits.
- A second Ctrl-C means "now" and raises KeyboardInterrupt. It counts only some time after the
  first: a terminal sends SIGINT to every process of a launch and the launcher forwards its own
  copy, so one key press arrives twice.
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
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Stop request by signal; `requested` is the name of the first signal ("SIGTERM"), else None.

    - `announce`: confirm the request on stderr.
    - `echo_seconds`: a SIGINT sooner than this after the first counts as the launcher's copy of it.
    """

    def __init__(
        self,
        echo_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        announce: bool = False,
    ) -> None:
        self.requested: str | None = None
        self._announce = announce
        self._echo_seconds = echo_seconds
        self._clock = clock
        self._first_interrupt: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> Self:
        """Install handlers for all SIGNALS; main thread only, once."""
        assert threading.current_thread() is threading.main_thread(), (
            "signal handlers belong to the main thread"
        )
        assert not self._before, "the handlers are installed already"
        for number in SIGNALS:
            # Ignored by nohup: the run must survive the closed terminal.
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)

        return self

    def restore(self) -> None:
        """Restore the previous handlers; no effect when not installed."""
        for number, before in self._before.items():
            # None: the handler was installed by C code, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
            if self._announce:
                # Bypass all buffers: the signal may interrupt a write to the same stream.
                os.write(
                    2, f"\nk2train: {self.requested}: finishing the step, then saving\n".encode()
                )

        # Only a second Ctrl-C interrupts at once.
        if number != signal.SIGINT:
            return

        now = self._clock()
        if self._first_interrupt is None:
            self._first_interrupt = now
        elif now - self._first_interrupt >= self._echo_seconds:
            raise KeyboardInterrupt
