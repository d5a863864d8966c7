"""Being asked to stop: the handler only notes the request, the training loop acts on it between two steps.

Saving inside the handler is refused: it may run in the middle of a collective or of a write. The loop reads
`requested`, agrees on it with the other ranks, saves and leaves.
A second Ctrl-C means "now" and raises KeyboardInterrupt. It counts only some time after the first: a terminal sends
SIGINT to every process of a launch and the launcher passes its own copy on, so one press of the keys arrives twice.
USR1 and USR2 stop like SIGTERM: batch systems send them some minutes before a time limit, or on preemption. So does the
SIGHUP of a terminal that is closed, save where it is ignored already: under nohup nobody wants to hear of it.
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
    """`requested` is the name of the first signal that asked to stop ("SIGTERM"), else None.

    `announce`: say on stderr that the request was heard. `echo_seconds`: a SIGINT sooner than this after the first one is taken for the launcher's copy of it.
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
        """Take over SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2; only in the main thread, once."""
        assert threading.current_thread() is threading.main_thread(), (
            "signal handlers belong to the main thread"
        )
        assert not self._before, "the handlers are installed already"
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    def restore(self) -> None:
        """Give the signals back to whoever had them; harmless when not installed."""
        for number, before in self._before.items():
            # None: installed by C code, which Python cannot put back.
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
                # Past all buffers: the handler may stand in the middle of a write to the same stream.
                os.write(
                    2, f"\nk2train: {self.requested}: finishing the step, then saving\n".encode()
                )
        if number != signal.SIGINT:
            return
        now = self._clock()
        if self._first_interrupt is None:
            self._first_interrupt = now
        elif now - self._first_interrupt >= self._echo_seconds:
            raise KeyboardInterrupt
