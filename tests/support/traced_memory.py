"""Peak memory of Python objects that one call makes, traced in a process of its own.

- tracemalloc counts all that a process makes: its threads, and what other tests have left in it. So
  the call is made in a process of the fork server, which no test has touched.
- A call that takes more than it may is made again. What it holds when it goes above the limit is
  printed by line of code: a test that fails says whose it was.

Alternatives considered: what is held at the end, which is little when the most was held meanwhile;
a snapshot at each new maximum, whose own objects are traced as well.
"""

import importlib
import json
import math
import os
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support import forkserver

LINES = 8
"""Lines of code to print, those that hold most."""


def traced_peak(
    prepare: Callable[..., Callable[[], object]], *arguments: object, limit_bytes: float = math.inf
) -> int:
    """Most bytes that Python objects made by `prepare(*arguments)()` held at once.

    `prepare` is a function of a module, and takes strings: it is called in another process. What it
    makes itself is not counted. Above `limit_bytes` it is called a second time, to say why.
    """
    peak = int(_traced(prepare, math.inf, arguments)["peak"])
    if peak > limit_bytes:
        again = _traced(prepare, limit_bytes, arguments)
        print(f"{peak} bytes, and {again['peak']} when called again; above {limit_bytes:.0f} held:")
        print(*again["held"], sep="\n")
    return peak


def _traced(
    prepare: Callable[..., Callable[[], object]], limit_bytes: float, arguments: Sequence[object]
) -> dict[str, Any]:
    name = f"{prepare.__module__}:{prepare.__qualname__}"
    done = forkserver.run(
        [f"{__name__}:main", limit_bytes, name, *map(str, arguments)],
        {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        Path.cwd(),
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class _Held:
    """A profile function: notes what is held when it first sees more than `limit_bytes`."""

    def __init__(self, limit_bytes: float) -> None:
        self.limit_bytes = limit_bytes
        self.lines: list[str] = []

    def __call__(self, *_: object) -> None:
        if not self.lines and tracemalloc.get_traced_memory()[0] > self.limit_bytes:
            sys.setprofile(None)
            most = tracemalloc.take_snapshot().statistics("lineno")[:LINES]
            self.lines = list(map(str, most))


def main(arguments: Sequence[str]) -> int:
    """Trace `LIMIT MODULE:FUNCTION ARGUMENTS` and print what was found, as JSON."""
    held = _Held(float(arguments[0]))
    module, _, name = arguments[1].partition(":")
    call = getattr(importlib.import_module(module), name)(*arguments[2:])

    tracemalloc.start()
    if held.limit_bytes < math.inf:
        sys.setprofile(held)
    call()
    sys.setprofile(None)
    peak = tracemalloc.get_traced_memory()[1]
    print(json.dumps({"peak": peak, "held": held.lines}))
    return 0
