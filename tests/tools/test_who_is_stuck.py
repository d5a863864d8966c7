"""`tools/who_is_stuck.py` on synthetic and real runs: the right rank first, and the exit code."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from k2train.processes import Process
from k2train.watchdog.failure_report import publish_report
from k2train.watchdog.heartbeat import Heartbeat, write_heartbeat
from tests.support.watched_jobs import Job
from tools.who_is_stuck import main

TOOL = Path(__file__).parents[2] / "tools/who_is_stuck.py"


def record(rank: int, world: int) -> Heartbeat:
    process = Process(1000 + rank, 1, "another boot", "pid:[1]", f"node{rank // 8}")
    return Heartbeat(
        rank, world, process, 1, "step", 41, 30.0, 1234, "all-reduce tp", "all-reduce tp"
    )


@contextmanager
def running(
    directory: Path, world: int, change: Callable[[Heartbeat], Heartbeat | None]
) -> Iterator[None]:
    """Heartbeats of ranks on other machines.

    `change` says what is special, None: this one does not write.
    """
    directory.mkdir()
    records = [record(rank, world) for rank in range(world)]
    for one in records:
        write_heartbeat(directory, one)
    over = threading.Event()

    def beat() -> None:
        number = 1
        while not over.wait(0.05):
            number += 1
            for one in records:
                changed = change(replace(one, beat=number))
                if changed is not None:
                    write_heartbeat(directory, changed)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    code = main([*map(str, arguments), "--wait", "1"])
    return code, capsys.readouterr().out.splitlines()


def test_a_silent_rank_comes_first_of_480(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path / "watch", 480, lambda one: None if one.rank == 77 else one):
        code, lines = ask(capsys, tmp_path)
    assert code == 1
    assert lines[0].startswith("rank 77 (pid 1077 on host node9) gives no sign of life for"), lines[
        0
    ]
    assert lines[2].split()[:2] == ["77", "node9"]
    assert len(lines) == 23 and "460 more" in lines[-1]


def test_a_rank_in_no_collective_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(
        tmp_path / "watch", 4, lambda one: replace(one, current="") if one.rank == 2 else one
    ):
        code, lines = ask(capsys, tmp_path)
    assert code == 1
    assert lines[0] == (
        "rank 2 (pid 1002 on host node0) is stuck: step 41, forward/backward, for 30 s; last "
        "collective 1234 all-reduce tp"
    )
    assert [line.split()[0] for line in lines[2:]] == ["2", "0", "1", "3"]


def test_a_run_that_goes_on_has_nobody_stuck(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path / "watch", 4, lambda one: replace(one, count=1234 + one.beat)):
        code, lines = ask(capsys, tmp_path)
    assert (code, lines[0]) == (0, "no rank is stuck: 4 ranks at step 41")


def test_a_long_wait_that_has_just_begun_is_nobody_s_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path / "watch", 4, lambda one: replace(one, seconds=2.0)):
        assert ask(capsys, tmp_path)[0] == 0


def test_a_rank_that_has_not_come_up_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path / "watch", 4, lambda one: None if one.rank == 3 else one):
        (tmp_path / "watch/rank_00003.json").unlink()
        code, lines = ask(capsys, tmp_path)
    assert (code, lines[0]) == (1, "rank 3 has not started: it has written no heartbeat")


def test_of_a_run_that_has_ended_it_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "watch"
    directory.mkdir()
    for rank in range(2):
        write_heartbeat(directory, replace(record(rank, 2), state="leaving"))
    publish_report(directory, {"line": "rank 1 died at step 7", "told_by": 0}, None)
    code, lines = ask(capsys, tmp_path)
    assert (code, lines[0]) == (1, "the run has ended: rank 1 died at step 7")


def test_of_a_run_that_ended_well_nobody_is_stuck(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "watch"
    directory.mkdir()
    for rank in range(2):
        write_heartbeat(directory, replace(record(rank, 2), state="closed"))
    code, lines = ask(capsys, tmp_path)
    assert (code, lines[0]) == (0, "the run has ended: 2 ranks exited by themselves")


def test_no_such_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has no heartbeat" in error


def test_it_needs_no_torch_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "watch").mkdir()
    write_heartbeat(tmp_path / "watch", replace(record(0, 1), state="closed"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code = (
        f"import sys; sys.argv = ['x', {str(tmp_path)!r}, '--wait', '0.5']; import runpy\n"
        f"sys.path[0] = {str(TOOL.parent)!r}\n"
        f"try:\n    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit as left:\n    sys.exit(9 if 'torch' in sys.modules else left.code)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode
        == 0
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_stopped_rank_of_a_real_run_is_found(tmp_path: Path) -> None:
    with Job(tmp_path, 3, 300.0) as job:
        job.until_step(20)
        job.send(signal.SIGSTOP, 1)
        time.sleep(1)
        done = subprocess.run(
            [sys.executable, TOOL, tmp_path], capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stdout.startswith(f"rank 1 (pid {job.pids[1]} on host "), done.stdout
    assert "is stopped (SIGSTOP)" in done.stdout.splitlines()[0]
