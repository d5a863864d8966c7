"""Kills of a piece of work before its writes: forked children that end themselves with SIGKILL.

- Moments are counted in calls that change a folder, not in seconds: a test that was green covers
  the same ones on every machine.
- Each child finds what the one before has left.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

CALLS = (
    *((os, name) for name in ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")),
    (shutil, "rmtree"),
)


def killed_before_writes(work: Callable[[], object], step: int = 1) -> Iterator[int]:
    """Kill `work` before its 1st call that writes, then before that 1 + `step`, and so on; yield
    the number after each kill. Ends when a child has done all of it.
    """
    for number in count(1, step):
        child = os.fork()
        if child == 0:
            _child(work, number)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert status == 0, f"the work failed after kills, before write {number}"
            return
        yield number


def _child(work: Callable[[], object], left: int) -> None:
    def counted(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    code = 1
    try:
        for owner, name in CALLS:
            setattr(owner, name, counted(getattr(owner, name)))
        work()
        code = 0
    finally:
        os._exit(code)
