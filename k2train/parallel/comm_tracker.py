"""What this rank exchanges with others: how many collectives and transfers, which one is under way, how long the host waited.

Every collective, send and receive of the package goes through `collective_scope` of its axis. The watch of a run reads the numbers
from another thread, so each is one attribute that is written whole; the rank's own thread never waits for a reader.
Refused: the flight recorder of the process group (NCCL only, and read after the end), and patching torch.distributed from
outside (it cannot say which micro-batch, and sees the checkpoint thread's exchanges as the trainer's).
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType


class CommTracker:
    """Collectives and transfers of one rank; written by the thread that trains, read by any.

    `count`: begun so far; `current`: name of the one under way or waited for, "" outside; `last`: name of the last one
    begun; `blocked_seconds`: what the host waited in all of them; `broken`: name of the one that raised, "" as long as
    none has: a peer is gone, or the backend gave up. `cells[0]` is a second place for `count`; the watch puts memory there
    that outlives the process.
    """

    __slots__ = ("_began", "blocked_seconds", "broken", "cells", "count", "current", "last")

    def __init__(self) -> None:
        self.count = 0
        self.current = self.last = self.broken = ""
        self.blocked_seconds = self._began = 0.0
        self.cells: list[int] | memoryview[int] = [0]

    def collective(self, name: str) -> "CommTracker":
        """Context of a collective or transfer that begins, e.g. `all-reduce tp`. Not to be nested."""
        self.count += 1
        self.cells[0] = self.count
        self.current = self.last = name
        return self

    def wait(self, name: str) -> "CommTracker":
        """Context of a wait for one that was begun before, or for the device."""
        self.current = name
        return self

    def __enter__(self) -> None:
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

    def position(self) -> tuple[int, str, str, float]:
        """(count, current, last, blocked_seconds) for the watch."""
        return self.count, self.current, self.last, self.blocked_seconds


Context = AbstractContextManager[None]
_NOTHING: Context = nullcontext()


def collective_scope(comm: CommTracker | None, name: str) -> Context:
    """`comm.exchange(name)`, or nothing without a comm."""
    return _NOTHING if comm is None else comm.collective(name)


def wait_scope(comm: CommTracker | None, name: str) -> Context:
    """`comm.wait(name)`, or nothing without a comm."""
    return _NOTHING if comm is None else comm.wait(name)


class CombinedWork:
    """Several transfers under way as one: `wait` returns when all are done."""

    def __init__(self, waits: list[Callable[[], object]]):
        self._waits = waits

    def wait(self) -> None:
        """Wait for each, in the order they were begun."""
        for wait in self._waits:
            wait()
