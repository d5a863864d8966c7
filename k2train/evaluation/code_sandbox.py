"""Sandbox for programs that a model wrote: one subprocess each, without network, within limits.

- A program passes when it runs to its end. It has seconds of CPU and of the clock, memory, files,
  processes and output within bounds, an empty environment, and a folder of its own.
- Linux namespaces are the wall: no network, no other process, and no file but the interpreter's.
  `code_sandbox_child` builds them from inside; neither root nor a setuid helper is needed.
- Where a system has none, limits and Python's audit hook are what is left. That stops accidents,
  not attacks, so it must be asked for by name.
- The limit of CPU seconds decides about slow programs: it does not depend on what else the machine
  does. The wall limit ends those that sleep.
- A program that looks for the secret in its own process can claim to have passed.

Alternatives considered:
- `exec` in a process of this project, as HumanEval's own script: it can read and write everything.
- Docker: a daemon with the rights of root, which clusters do not have.

Source: what to fear of such programs: Chen et al. 2021 (arXiv:2107.03374), section 2.3.
"""

import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from k2train.errors import UserError
from k2train.evaluation.code_sandbox_calls import refused_calls

CHILD = Path(__file__).with_name("code_sandbox_child.py")
FLAGS = ("-s", "-S", "-P", "-B")
"""No packages, no path of this project, no files written beside sources."""
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
"""All that a program finds there; the order of its sets is the same each time."""
VERDICT_BYTES = 4096
OVER_CPU = 128 + signal.SIGXCPU

Kind = Literal["passed", "failed", "time", "output", "ended"]


WALL_TO_CPU = 12
"""Seconds by the clock for each of CPU: a busy machine must not decide."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int = 5
    wall_seconds: float = 60.0
    memory_bytes: int = 512 * 2**20
    """Address space of each process."""
    folder_bytes: int = 32 * 2**20
    """All files that it writes together, and the size of each."""
    output_bytes: int = 64 * 2**10
    processes: int = 16
    """Threads count, and three belong to the sandbox."""
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    `failed`: with an exception. `time`: a limit of seconds. `output`: more than it may print.
    `ended`: without a word, by a signal or by leaving before its last line.
    """

    kind: Kind
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.kind == "passed"


@dataclass(frozen=True)
class Sandbox:
    """Runs programs; `namespaces` is whether the kernel shuts them off."""

    limits: Limits
    namespaces: bool
    reason: str = ""
    """Why there are no namespaces."""

    @classmethod
    def open(cls, limits: Limits | None = None, allow_weak: bool = False) -> "Sandbox":
        """Return the strongest sandbox of this system.

        Raises UserError where that is not one of namespaces, unless `allow_weak`.
        """
        strong = cls(limits or Limits(), True)
        # Its own limits, so that small ones of the caller do not look like a missing wall.
        outcome = cls(Limits(), True).run("pass")
        if outcome.passed:
            return strong
        if not allow_weak:
            raise UserError(
                f"programs cannot be shut off here ({outcome.detail}): run this on a Linux whose "
                "kernel allows namespaces, or take limits alone with --weak-sandbox, which code "
                "that means harm gets around"
            )
        return cls(limits or Limits(), False, outcome.detail)

    @property
    def protection(self) -> str:
        """Name of what is enforced."""
        return "namespaces" if self.namespaces else "limits and audit hook"

    def run_all(self, sources: Sequence[str], workers: int = 1) -> list[Outcome]:
        """Run programs, `workers` at a time; outcomes in their order."""
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self.run, sources))

    def run(self, source: str) -> Outcome:
        """Run one program and say how it ended. Nothing of it is left."""
        secret = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="k2train_program_") as folder:
            job = {
                **asdict(self.limits),
                "namespaces": self.namespaces,
                "folder": os.path.realpath(folder),
                "source": source,
                "secret": secret,
                "refused_calls": refused_calls(platform.machine()).hex(),
            }
            with _started(job) as (process, verdict):
                ended = _Watched(process, verdict, self.limits).wait()
        return _outcome(ended, secret, self.limits)


@dataclass(frozen=True)
class _Ended:
    """What was seen of a program: why it was killed, if it was; its exit code, and its verdict."""

    killed: Literal["", "time", "output"]
    code: int
    verdict: bytes


def _outcome(ended: _Ended, secret: str, limits: Limits) -> Outcome:
    if ended.verdict == f"passed {secret}".encode():
        return Outcome("passed")
    if ended.killed == "time":
        return Outcome("time", f"more than {limits.wall_seconds:g} s by the clock")
    if ended.killed == "output":
        return Outcome("output", f"more than {limits.output_bytes:,} bytes printed")
    kind, _, detail = ended.verdict.decode(errors="replace").partition(" ")
    if kind == "failed":
        return Outcome("failed", detail)
    if kind == "unavailable":
        return Outcome("ended", detail)
    if ended.code == OVER_CPU:
        return Outcome("time", f"more than {limits.cpu_seconds} s of CPU")
    return Outcome("ended", f"without a verdict, exit code {ended.code}")


@contextmanager
def _started(job: dict[str, object]) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """Start the child of a job; yields it and the pipe of its verdict. It is gone afterwards."""
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [os.path.realpath(sys.executable), *FLAGS, str(CHILD), str(writing), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=[writing],
            start_new_session=True,
        )
    except OSError:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    try:
        with suppress(BrokenPipeError), _input(process) as stream:
            stream.write(json.dumps(job).encode())
        yield process, reading
    finally:
        _kill(process)
        process.wait()
        os.close(reading)
        if process.stdout is not None:
            process.stdout.close()


def _input(process: "subprocess.Popen[bytes]") -> IO[bytes]:
    assert process.stdin is not None, "started with a pipe"
    return process.stdin


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the child's group. Process 1 of its namespaces is in it, so all others end, too."""
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


class _Watched:
    """Reads what a program prints and its verdict, until it ends or is over a limit."""

    def __init__(self, process: "subprocess.Popen[bytes]", verdict: int, limits: Limits) -> None:
        self._process, self._limits = process, limits
        self._printed, self._verdict = 0, b""
        assert process.stdout is not None, "started with a pipe"
        self._readers = {process.stdout.fileno(): self._print, verdict: self._say}

    def wait(self) -> _Ended:
        """Return what was seen; the child has ended, or was killed."""
        deadline = time.monotonic() + self._limits.wall_seconds
        killed: Literal["", "time", "output"] = ""
        with selectors.DefaultSelector() as waiting:
            for descriptor in self._readers:
                waiting.register(descriptor, selectors.EVENT_READ)
            while waiting.get_map():
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    killed = "time"
                    break
                for key, _ in ready:
                    block = os.read(key.fd, 2**16)
                    if not block:
                        waiting.unregister(key.fd)
                    self._readers[key.fd](block)
                if self._printed > self._limits.output_bytes:
                    killed = "output"
                    break
                # One that never stops writing is always ready.
                if time.monotonic() >= deadline:
                    killed = "time"
                    break

        if killed:
            _kill(self._process)
        # Both pipes are closed: nothing but an exit is left.
        return _Ended(killed, self._process.wait(), self._verdict)

    def _print(self, block: bytes) -> None:
        self._printed += len(block)

    def _say(self, block: bytes) -> None:
        self._verdict = (self._verdict + block)[:VERDICT_BYTES]
