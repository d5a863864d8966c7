"""Communication tracking: counts collectives, names the current one, sums the blocked time.

- Every collective, send and receive of the package runs inside `collective_scope` of its axis.
- The watchdog reads the numbers from another thread. Each is one attribute written in one go, so
  the training thread never waits for a reader.

Alternatives considered:
- The process group's flight recorder: NCCL only, and read after the end.
- Patching torch.distributed from outside: it cannot name the micro-batch, and it would count the
  saving thread's collectives as the trainer's.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol


class ExchangeListener(Protocol):
    """What is told when an exchange begins to block, and when it is over."""

    def block(self) -> None:
        """An exchange begins; from here on this rank may wait for others."""

    def resume(self) -> None:
        """The exchange is over."""


class CommTracker:
    """Collectives and transfers of one rank. Written by the training thread, read by any thread.

    - `count`: collectives begun so far.
    - `current`: name of the collective being issued or waited for; "" outside.
    - `last`: name of the last collective begun.
    - `blocked_seconds`: time the host was blocked in all of them.
    - `broken`: name of the first collective that raised, else "". A peer is gone, or the backend
      gave up.
    - `cells[0]`: a copy of `count`. The watchdog puts memory there that outlives the process.
    - `own_time`: told when an exchange begins and ends, so that it times the work between them.
    """

    __slots__ = (
        *("_began", "blocked_seconds", "broken", "cells", "count", "current", "last"),
        "own_time",
    )

    def __init__(self) -> None:
        self.count = 0
        self.current = self.last = self.broken = ""
        self.blocked_seconds = self._began = 0.0
        self.cells: list[int] | memoryview[int] = [0]
        self.own_time: ExchangeListener | None = None

    def collective(self, name: str) -> "CommTracker":
        """Context of a new collective or transfer, such as `all-reduce tp`. Must not be nested."""
        self.count += 1
        self.cells[0] = self.count
        self.current = self.last = name
        return self

    def wait(self, name: str) -> "CommTracker":
        """Context of a wait for an earlier collective, or for the device."""
        self.current = name
        return self

    def __enter__(self) -> None:
        if self.own_time is not None:
            self.own_time.block()
        self._began = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.blocked_seconds += time.perf_counter() - self._began
        if kind is not None:
            self.broken = self.broken or self.current
        self.current = ""
        if self.own_time is not None:
            self.own_time.resume()

    def position(self) -> tuple[int, str, str, float]:
        """Return (count, current, last, blocked_seconds) for the watchdog."""
        return self.count, self.current, self.last, self.blocked_seconds


Context = AbstractContextManager[None]
_NOTHING: Context = nullcontext()


def collective_scope(comm: CommTracker | None, name: str) -> Context:
    """Return `comm.collective(name)`, or a no-op context when `comm` is None."""
    return _NOTHING if comm is None else comm.collective(name)


def wait_scope(comm: CommTracker | None, name: str) -> Context:
    """Return `comm.wait(name)`, or a no-op context when `comm` is None."""
    return _NOTHING if comm is None else comm.wait(name)


class CombinedWork:
    """Several transfers as one: `wait` returns when all are done."""

    def __init__(self, waits: list[Callable[[], object]]):
        self._waits = waits

    def wait(self) -> None:
        """Wait for each transfer, in the order they were begun."""
        for wait in self._waits:
            wait()
