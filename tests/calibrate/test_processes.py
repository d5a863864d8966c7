"""Processes of a calibration: one that fails ends the others and says why."""

import os
import select
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from k2train.calibrate import processes
from k2train.errors import UnavailableError
from tests.support.command_line import HANG_SECONDS

TASK: dict[str, Any] = {"ranks": 2, "threads": 1}


def fake(script: str, started: list["Popen[bytes]"]) -> Any:
    """`processes.start` with another program, which gets the task and the rank."""

    def start(arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> "Popen[bytes]":
        assert variables == {"OMP_NUM_THREADS": "1"}
        with log.open("wb") as stream:
            command = [sys.executable, "-S", "-c", script, *arguments[-2:]]
            started.append(Popen(command, stdout=stream, stderr=stream))
        return started[-1]

    return start


def test_results_come_in_rank_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks in the order in which they end, and a folder that is gone too early."""
    script = (
        "import pathlib, sys; task, rank = pathlib.Path(sys.argv[1]), sys.argv[2]; "
        "assert b'store' in task.read_bytes(); "
        "task.with_name(f'rank_{rank}.json').write_text('{\"rank\": ' + rank + '}')"
    )
    monkeypatch.setattr(processes, "start", fake(script, []))
    assert processes.run_task(TASK, 600) == [{"rank": 0}, {"rank": 1}]


def test_one_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that waits for ever for one that is gone, and a reason that is lost."""
    started: list[Popen[bytes]] = []
    script = (
        "import sys, time; rank = int(sys.argv[2]); "
        "time.sleep(3600) if rank == 0 else sys.exit('no such kernel')"
    )
    monkeypatch.setattr(processes, "start", fake(script, started))
    with pytest.raises(UnavailableError, match=r"process 1 of 2 ended with .* 1: no such kernel"):
        processes.run_task(TASK, 600)
    assert all(process.returncode is not None for process in started)
    with pytest.raises(UnavailableError, match="took more than 0 s"):
        processes.run_task({**TASK, "ranks": 1}, 0)
    assert all(process.returncode is not None for process in started)


def test_a_process_ends_with_the_one_that_started_it() -> None:
    """Catches workers that measure on for minutes after the driver was killed."""
    reader, writer = os.pipe()
    child = (
        "import os, time; from k2train.calibrate.processes import end_with_parent; "
        f"end_with_parent(); os.write({writer}, b'up'); time.sleep(600)"
    )
    driver = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], "
        f"pass_fds=({writer},))"
    )
    started = Popen([sys.executable, "-c", driver], pass_fds=(writer,), cwd=processes.ROOT)
    os.close(writer)
    try:
        assert os.read(reader, 2) == b"up"
        started.kill()
        started.wait()
        # The pipe ends with the last process that could write to it.
        assert select.select([reader], [], [], HANG_SECONDS)[0], "it lives on"
        assert os.read(reader, 2) == b""
    finally:
        started.kill()
        started.wait()
        os.close(reader)
