"""Contender processes as the driver controls them: started once, commanded by lines, always ended.

- Each rank has pipes of its own.
- A rank that ends, reports a problem or does not answer in time ends all processes of its
  contender. The problem is recorded, and never raised into the measurement of the others.
- Each rank leads a session, so that its child processes (a compiler, for example) end with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.cpu.contenders import Contender
from benchmarks.cpu.work import Work

ROOT = Path(__file__).resolve().parents[3]
WORKERS = {
    "benchmarks.cpu.worker": "tools/benchmarks/cpu",
    "bench_peers.worker": "tools/bench_peers",
}
"""The module of a contender's process and its folder in the tree; the second is the place in older
commits.
"""
# As high as they go: what a step frees stays in the process for the next one, for every contender
# alike.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**62)}
ENDING_SECONDS = 10.0
GRACE_SECONDS = 1.0
"""Seconds that the other ranks get to report, once one has reported a problem."""
Answer = dict[str, Any]


def threads_of(contender: Contender, cores: int) -> int:
    """Threads of each process: an equal share of the cores, at least one."""
    return max(1, cores // contender.world)


def worker_of(root: Path) -> str | None:
    """Module that runs a contender's process in the tree at `root`, or None."""
    return next(
        (module for module, at in WORKERS.items() if (root / at / "worker.py").is_file()), None
    )


def environment(root: Path, threads: int) -> dict[str, str]:
    """Environment variables of a worker process."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONHOME")
    }
    own = {
        "PYTHONPATH": f"{root / 'tools'}{os.pathsep}{root}",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # Otherwise a pool of compiling processes stays, in a session of its own.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }

    return kept | MALLOC | own


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    errors: Path
    heard: bytes = b""


class ContenderProcesses:
    """Processes of `contender`.

    `problem` says why there are none, `kind` is unavailable or failed.
    """

    def __init__(
        self, contender: Contender, work: Work, cores: int, folder: Path, extra_path: str = ""
    ):
        self.contender, self.threads = contender, threads_of(contender, cores)
        self.problem: str | None = None
        self.kind = ""
        self.ranks: list[_Rank] = []
        folder.mkdir()
        root = contender.root or ROOT
        worker = worker_of(root)
        assert worker is not None, f"{root} has no worker to run"
        self.worker = worker
        variables = environment(root, self.threads)
        if extra_path:
            variables["PYTHONPATH"] += os.pathsep + extra_path
        for rank in range(contender.world):
            spec = {
                "driver": os.getpid(),
                "name": contender.name,
                "module": None if contender.root else contender.module,
                "options": None if contender.root else dict(contender.options),
                "work": dataclasses.asdict(work),
                "precision": contender.precision,
                "rank": rank,
                "world": contender.world,
                "threads": self.threads,
                "cores": cores,
                "store": str(folder / "store"),
            }
            self.ranks.append(self._start(rank, spec, variables, folder))

    def _start(
        self, rank: int, spec: dict[str, Any], variables: dict[str, str], folder: Path
    ) -> _Rank:
        errors = folder / f"rank_{rank}.err"
        with errors.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", self.worker, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                # Processes that compile the same thing into one cache read each other's unfinished
                # files.
                env={**variables, "TORCHINDUCTOR_CACHE_DIR": str(folder / f"compiled_{rank}")},
                cwd=folder,
                start_new_session=True,
            )

        return _Rank(process, errors)

    @property
    def alive(self) -> bool:
        """True when it can be asked."""
        return self.problem is None and bool(self.ranks)

    def ask(self, line: str | None, limit_seconds: float) -> list[Answer] | None:
        """Send the line to every rank (None: only listen).

        Return their answers, or None after a problem.
        """
        if not self.alive:
            return None
        if line is not None:
            for rank in self.ranks:
                # A rank that is gone is found out by its silence, with its last words.
                with contextlib.suppress(BrokenPipeError):
                    self._input(rank).write(line.encode() + b"\n")
                    self._input(rank).flush()

        answers = self._listen(line or "start", limit_seconds)
        if answers is not None:
            faults = [a for a in answers if "problem" in a]
            if not faults:
                return answers
            self._give_up(str(faults[0]["problem"]), str(faults[0].get("kind", "failed")))

        return None

    def _listen(self, what: str, limit_seconds: float) -> list[Answer] | None:
        deadline = time.monotonic() + limit_seconds
        answers: dict[int, Answer] = {}
        problems: list[Answer] = []

        with selectors.DefaultSelector() as selector:
            for number, rank in enumerate(self.ranks):
                selector.register(self._output(rank), selectors.EVENT_READ, number)
            while len(answers) < len(self.ranks):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and problems:
                    # The others may wait for that rank for ever.
                    break
                if not ready:
                    silent = sorted(set(range(len(self.ranks))) - set(answers))
                    self._give_up(
                        f"no answer to {what!r} within {limit_seconds:g} s from rank {silent}",
                        "failed",
                    )
                    return None
                for key, _ in ready:
                    answer = self._hear(key.data)
                    if answer is None:
                        continue
                    answers[key.data] = answer
                    if "problem" in answer:
                        selector.unregister(key.fileobj)
                        problems.append(answer)
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)

        # A rank that ended is the cause of what its peers complain of: after a reported problem a
        # rank stays.
        cause = sorted(problems, key=lambda answer: not answer.get("ended"))[:1]
        return cause or [answers[number] for number in sorted(answers)]

    def _hear(self, number: int) -> Answer | None:
        """Read a rank's answer if a whole line of it is there.

        The end of a rank counts as an answer.
        """
        rank = self.ranks[number]
        piece = os.read(self._output(rank).fileno(), 65536)

        if not piece:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(ENDING_SECONDS)
            return {
                "problem": f"rank {number} ended with {_ending(rank)}",
                "kind": "failed",
                "ended": True,
            }

        rank.heard += piece
        line, newline, rest = rank.heard.partition(b"\n")
        if not newline:
            return None
        rank.heard = rest
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None

        return (
            answer
            if isinstance(answer, dict)
            else {"problem": f"rank {number} answered {line[:80]!r}"}
        )

    def _give_up(self, problem: str, kind: str) -> None:
        self.problem, self.kind = problem, kind
        self.end()

    def end(self) -> None:
        """End every process of the contender with its children; idempotent."""
        for rank in self.ranks:
            # Also after its leader's end: the group lives as long as anyone in it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)

        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(ENDING_SECONDS)
            for pipe in (rank.process.stdin, rank.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

        self.ranks = []

    def _input(self, rank: _Rank) -> IO[bytes]:
        assert rank.process.stdin is not None, "started with a pipe"
        return rank.process.stdin

    def _output(self, rank: _Rank) -> IO[bytes]:
        assert rank.process.stdout is not None, "started with a pipe"
        return rank.process.stdout


def _ending(rank: _Rank) -> str:
    code = rank.process.returncode
    how = "no exit code" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
    lines = [
        line.strip()
        for line in rank.errors.read_text(errors="replace").splitlines()
        if line.strip()
    ]
    return f"{how}: {lines[-1][:200]}" if lines else how
