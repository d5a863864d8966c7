"""Signals in the first seconds of a program, while it imports: kept, and acted on afterwards.

- Imports take seconds, on a busy machine or a slow file system much longer. Until a program has
  handlers of its own, Ctrl-C is a traceback out of somebody's module, and SIGTERM ends it without
  a word.
- `python -m k2train.train` and `python -m k2train.launch` import this module before anything that
  takes time. It keeps the signals; what installs the real handlers takes them over (`replace`).
- A tool ends at once, with one line and exit code 130 (`end_at_interrupt`): it has begun nothing.
- Only the program itself is concerned: nothing happens where its modules are imported by others.
- Standard library only, and little of it.

Alternatives considered:
- Raising an exception in the midst of an import: torch aborts the process then.
- Ending at once, in the handler: a rank of several has to find out first whether the signal is a
  request or the consequence of a failure.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

KEPT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PROGRAMS = ("k2train.train.__main__", "k2train.launch.__main__")
"""Programs whose first import of the package is this module."""
EXIT_INTERRUPTED = 130
"""As in `k2train.errors`, which is imported later."""

Handler = Callable[[int, FrameType | None], object]

_before: dict[signal.Signals, Any] = {}
"""Handlers to restore; empty where no signal is kept."""
_came: list[int] = []


def keep() -> None:
    """Keep signals from now on; `replace` or `take` hands them over. Main thread only."""
    for number in KEPT:
        # Under nohup SIGHUP is ignored, and stays so.
        if number not in _before and signal.getsignal(number) != signal.SIG_IGN:
            _before[number] = signal.signal(number, _keep)


def replace(handler: Handler) -> tuple[dict[signal.Signals, Any], list[int]]:
    """Install the program's own handler for the signals of `KEPT`; main thread only.

    Returns the handlers to restore at its end, and the signals that were kept, oldest first. None
    is lost in between. An ignored SIGHUP, as under nohup, stays so.
    """
    before: dict[signal.Signals, Any] = {}
    for number in KEPT:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            former = signal.signal(number, handler)
            before[number] = _before.pop(number, former)
    return before, take()


def take() -> list[int]:
    """Return the signals that were kept, oldest first, and restore the former handlers."""
    for number, before in _before.items():
        signal.signal(number, signal.SIG_DFL if before is None else before)
    _before.clear()
    came = _came.copy()
    _came.clear()
    return came


def end_at_interrupt() -> None:
    """Let Ctrl-C end this process at once, with one line, until `take`. Main thread only."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        _before[signal.SIGINT] = signal.signal(signal.SIGINT, _end)


def _keep(number: int, frame: FrameType | None) -> None:
    _came.append(number)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def _is_program(main: ModuleType | None) -> bool:
    return getattr(getattr(main, "__spec__", None), "name", None) in PROGRAMS


if _is_program(sys.modules.get("__main__")):
    keep()
