"""Processes of a calibration: started, waited for and ended; needs no torch itself.

- Each task is a set of processes of its own, with the threads that a run's launcher gives them.
- One that fails ends the others, and its last line is the error.
- They end with the process that started them, however it ends.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from k2train.errors import UnavailableError
from k2train.launch.status import SET_PARENT_DEATH_SIGNAL

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.05


def start(
    arguments: Sequence[str], variables: Mapping[str, str], log: Path, piped: bool = False
) -> "subprocess.Popen[bytes]":
    """Start this interpreter with this checkout first in its path; it talks over loopback alone.

    Its output goes to `log`; `piped`, what it prints and reads goes through pipes.
    """
    path = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, sys.path)]))
    given = {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", **variables}
    settings = [f"{name}={value}" for name, value in given.items()]
    with log.open("wb") as stream:
        return subprocess.Popen(
            ["env", *settings, sys.executable, *arguments],
            stdin=subprocess.PIPE if piped else None,
            stdout=subprocess.PIPE if piped else stream,
            stderr=stream,
        )


def end_with_parent() -> None:
    """Have the kernel end this process with its parent, where the kernel is Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def run_task(task: Mapping[str, Any], limit_seconds: float) -> list[dict[str, Any]]:
    """Results of the processes, in rank order. Raises UnavailableError: one failed or hangs."""
    with TemporaryDirectory(prefix="k2train-calibrate-") as name:
        folder = Path(name)
        path = folder / "task.json"
        path.write_text(json.dumps({**task, "store": str(folder / "store")}), encoding="utf-8")
        threads = {"OMP_NUM_THREADS": str(task["threads"])} if task["threads"] else {}
        logs = [folder / f"log_{rank}" for rank in range(task["ranks"])]
        started = []
        try:
            for rank, log in enumerate(logs):
                worker = ["-m", "k2train.calibrate.worker", str(path), str(rank)]
                started.append(start(worker, threads, log))
            _wait(started, logs, limit_seconds)
        finally:
            for process in started:
                process.kill()
                process.wait()
        return [
            json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8"))
            for rank in range(task["ranks"])
        ]


def _wait(
    started: Sequence["subprocess.Popen[bytes]"], logs: Sequence[Path], limit_seconds: float
) -> None:
    """Wait until all have ended. Raises UnavailableError."""
    end = time.monotonic() + limit_seconds
    while True:
        codes = [process.poll() for process in started]
        for rank, code in enumerate(codes):
            if code:
                raise UnavailableError(
                    f"calibration: process {rank} of {len(codes)} ended with exit code {code}: "
                    f"{last_line(logs[rank])}"
                )
        if None not in codes:
            return
        if time.monotonic() > end:
            raise UnavailableError(
                f"calibration: {len(codes)} processes took more than {limit_seconds:.0f} s; a "
                "busy machine needs --quick, fewer --ranks, or a quieter hour"
            )
        time.sleep(POLL_SECONDS)


def last_line(log: Path) -> str:
    """Last line of what a process said."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
