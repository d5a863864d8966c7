"""Worker process of a contender: builds it, executes the driver's lines, answers in lines of JSON.

    python -m benchmarks.cpu.worker SPEC        (SPEC: JSON, see `main`; started by the driver, one
    per rank)

- `run N` does N steps, `measure` one step under the memory profiler; end of input ends the process.
- Between lines it waits in a read of its own pipe, which costs no CPU.
- Standard output is for answers only; what libraries print goes to stderr.
- This file imports no torch: a process is tied to its driver before those seconds, and a broken
  installation is reported like any other problem.

Alternatives considered:
- A barrier or a polling queue between lines: both cost CPU.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any, TextIO

from benchmarks.cpu.contract import UnavailableError

SET_PARENT_DEATH_SIGNAL = 1
"""Its number for prctl, from linux/prctl.h."""


def main(spec: Mapping[str, Any]) -> int:
    """Serve one contender.

    `spec`: driver (its process id), name, work, precision, rank, world, threads, cores, store,
    module and options. Module null: the module and options that `name` has in this tree.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    try:
        serve = importlib.import_module("benchmarks.cpu.serve")
        built = serve.build(spec)
    except BaseException as problem:
        traceback.print_exc()
        send_answer(
            answers, problem=reason(problem), kind="unavailable" if missing(problem) else "failed"
        )
        return 1

    runtime = serve.runtime_facts()
    send_answer(answers, parameters=built.parameters, note=built.note, runtime=runtime)

    try:
        for line in sys.stdin:
            send_answer(answers, **serve.obey(built, line))
    except BaseException as problem:
        traceback.print_exc()
        send_answer(answers, problem=reason(problem), kind="failed")
        return 1

    return 0


def end_with(driver: int) -> None:
    """Ask the kernel to kill this process when the driver ends.

    A rank inside a collective does not see the end of its input.
    """
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != driver:
        os._exit(1)


def send_answer(answers: TextIO, **facts: Any) -> None:
    """Send one answer."""
    answers.write(json.dumps(facts) + "\n")
    answers.flush()


def missing(problem: BaseException) -> bool:
    """True when something is not installed or not supported (a package, a name in it, a layout)."""
    if isinstance(problem, ImportError):
        return not (problem.name or "").startswith(("k2train", "benchmarks"))
    return isinstance(problem, UnavailableError)


def reason(problem: BaseException) -> str:
    """Class and first line of an error; for a missing package its name."""
    if isinstance(problem, ModuleNotFoundError) and problem.name:
        return f"{problem.name} is not installed"
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    first_line = lines[0] if lines else ""
    return (
        first_line
        if isinstance(problem, UnavailableError)
        else (f"{type(problem).__name__}: {first_line}")
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    end_with(asked["driver"])
    code = main(asked)
    sys.stderr.flush()
    # After a problem it stays until the driver ends it: its peers would be heard complaining of a
    # lost connection.
    sys.stdin.read()
    # Without the usual end: gloo's threads abort a process that leaves before its peers.
    os._exit(code)
