"""Run lock: would catch two live runs in one directory, and a lock that outlives its holder.

Also a refused start that leaves files behind.
"""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from k2train.errors import RunError
from k2train.record.system_info import slurm_job_ended
from k2train.run_lock import lease
from k2train.run_lock.lock import RunLock
from tests.support.command_line import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, sys, time
from k2train.run_lock.lock import RunLock
lock = RunLock(sys.argv[1]).acquire()
if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        time.sleep(3600)
    print(child, flush=True)
else:
    print("held", flush=True)
time.sleep(3600)
"""


def _holder(directory: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    return holder, holder.stdout.readline().strip()


def _kill(holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert holder.stdout is not None
    holder.stdout.close()


def test_a_live_process_is_named_at_once_and_kill_9_frees_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At once: the kernel knows, so no lease is watched for a renewal.
    monkeypatch.delattr(lease.Lease, "_is_renewed")
    directory = tmp_path / "runs" / "demo"
    holder, said = _holder(directory)
    try:
        assert said == "held"
        before = sorted(os.listdir(directory))
        with pytest.raises(RunError) as refused:
            RunLock(directory).acquire()
        message = str(refused.value)
        assert (
            f"pid {holder.pid} " in message
            and socket.gethostname() in message
            and str(directory) in message
        )
        assert "since 20" in message and "kill -TERM" in message and "\n" not in message
        assert sorted(os.listdir(directory)) == before
    finally:
        _kill(holder)
    with RunLock(directory) as lock:
        assert lock.held
        assert json.loads((directory / "run.lock").read_text())["pid"] == os.getpid()


def test_a_forked_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    holder, child = _holder(tmp_path, "fork")
    _kill(holder)
    try:
        os.kill(int(child), 0)
        _acquire_soon(tmp_path).release()
    finally:
        os.kill(int(child), signal.SIGKILL)


def _acquire_soon(directory: Path, seconds: float = HANG_SECONDS) -> RunLock:
    """Acquire the lock once the forked child has run.

    On a busy machine its first action may take a while.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return RunLock(directory).acquire()
        except RunError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_two_locks_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    first = RunLock(tmp_path).acquire()
    with pytest.raises(RunError, match=f"pid {os.getpid()}"):
        RunLock(tmp_path).acquire()
    first.release()
    first.release()
    second = RunLock(tmp_path).acquire()
    with pytest.raises(AssertionError, match="already"):
        second.acquire()
    second.release()


def test_the_holder_is_described(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        holder = json.loads((tmp_path / "run.lock").read_text())
        names = {
            "pid",
            "host",
            "boot_id",
            "machine_id",
            "pid_space",
            "began_ticks",
            "start_time",
            "token",
        }
        assert set(holder) == names
        assert holder["token"] == 1 and holder["pid"] == os.getpid()
    assert (tmp_path / "run.lock").read_text() == "", "nobody is named once it is free"


def test_a_discarded_start_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "deep" / "demo"
    RunLock(directory).acquire().release(discard_if_empty=True)
    assert list(tmp_path.iterdir()) == []


def test_discarding_spares_what_others_made(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "demo").acquire()
    (tmp_path / "demo" / "ledger.jsonl").touch()
    lock.release(discard_if_empty=True)
    assert (tmp_path / "demo" / "ledger.jsonl").exists()
    (tmp_path / "own").mkdir()
    RunLock(tmp_path / "own").acquire().release(discard_if_empty=True)
    assert os.listdir(tmp_path / "own") == [], (
        "a directory that was there before is not ours to remove"
    )
    (tmp_path / "own" / "run.lock").touch()
    RunLock(tmp_path / "own").acquire().release(discard_if_empty=True)
    assert os.listdir(tmp_path / "own") == ["run.lock"]
    lock = RunLock(tmp_path / "runs" / "a").acquire()
    other = RunLock(tmp_path / "runs" / "b").acquire()
    lock.release(discard_if_empty=True)
    assert other.held and sorted(os.listdir(tmp_path / "runs")) == ["b"]
    other.release()


def test_a_directory_that_cannot_be_made_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be created: Not a directory; .*run\.directory"):
        RunLock(tmp_path / "file" / "demo").acquire()
    with pytest.raises(RunError, match="cannot be created: File name too long"):
        RunLock(tmp_path / "new" / ("x" * 300)).acquire()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("call", "number"),
    (("link", errno.EPERM), ("link", errno.ENOSYS), ("fsync", errno.EINVAL)),
)
def test_a_file_system_that_lacks_a_call_holds_a_lock(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run folder that is refused on FUSE mounts, with the lock blamed for it."""
    real = getattr(os, call)

    def refused(*given: Any) -> Any:
        if call == "link" or os.path.isdir(f"/proc/self/fd/{given[0]}"):
            raise OSError(number, os.strerror(number))
        return real(*given)

    monkeypatch.setattr(os, call, refused)
    with RunLock(tmp_path / "run") as lock:
        assert lock.token == 1
        lock.check()
        with pytest.raises(RunError, match="held by a live run"):
            RunLock(tmp_path / "run", flock=None).acquire()
    with RunLock(tmp_path / "run") as lock:
        assert lock.token == 2 and lock.taken_over_from is None


def test_what_failed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a lease that cannot be written told as a lock that cannot be taken."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(RunError, match=r"^no lease can be written in .*: Permission denied; "):
        RunLock(tmp_path / "run").acquire()
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_lost_its_name_is_not_taken_for_the_lock(
    tmp_path: Path,
) -> None:
    removed: list[Path] = []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(tmp_path / "run.lock")
            removed[0].unlink()
        fcntl.flock(descriptor, operation)

    with RunLock(tmp_path, flock=late), pytest.raises(RunError, match="held by a live run"):
        RunLock(tmp_path).acquire()
    assert removed


def test_only_one_of_many_holds_it_while_others_discard(tmp_path: Path) -> None:
    """Would catch the race in which a lock file is locked after its name was removed."""
    directory = tmp_path / "demo"
    inside: list[int] = []
    together: list[int] = []
    gained = [0]
    until = time.monotonic() + HANG_SECONDS

    def work() -> None:
        while gained[0] < 40 and time.monotonic() < until:
            lock = RunLock(directory)
            try:
                lock.acquire()
            except RunError as error:
                assert "held by a live run" in str(error)
                continue
            inside.append(1)
            together.append(len(inside))
            gained[0] += 1
            inside.pop()
            lock.release(discard_if_empty=True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(together) == {1} and gained[0] >= 40


def _squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A `squeue` that comes first on the PATH and notes how it was called."""
    folder.mkdir(exist_ok=True)
    calls = folder / "calls"
    script = folder / "squeue"
    script.write_text(f'#!/bin/sh\necho "$* ${{SQUEUE_STATES:-}}" >>{calls}\n{body}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return calls


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("echo RUNNING", False),
        ("echo PENDING", False),
        ("echo SUSPENDED", False),
        ("echo COMPLETING", False),
        ("echo COMPLETED; echo RUNNING", False),
        ("echo COMPLETED", True),
        ("echo TIMEOUT", True),
        ("", True),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", True),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", None),
        ("exec sleep 3600", None),
    ],
)
def test_slurm_s_word_on_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, answer: bool | None
) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "FAILED")
    calls = _squeue(tmp_path, monkeypatch, body)
    if "sleep" not in body:
        # An answer, however busy the machine.
        monkeypatch.setattr("k2train.record.system_info.SQUEUE_SECONDS", HANG_SECONDS)
    began = time.monotonic()
    assert slurm_job_ended("88") is answer
    assert time.monotonic() - began < HANG_SECONDS, "it waited for squeue"
    assert calls.read_text().strip() == "-h --all --states=all -j 88 -o %T"


def test_without_slurm_and_of_a_strange_job_id_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _squeue(tmp_path, monkeypatch, "echo COMPLETED")
    assert [slurm_job_ended(job) for job in ("", "--help", "8 8", "8;ls", "8_", "8\n")] == [
        None
    ] * 6
    assert not calls.exists()
    assert slurm_job_ended("8_3") is True
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert slurm_job_ended("88") is None


@pytest.mark.parametrize(("body", "free"), [("echo RUNNING", False), ("echo CANCELLED", True)])
def test_a_lock_takes_slurm_s_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, free: bool
) -> None:
    monkeypatch.setattr("k2train.run_lock.lease.RENEWAL_WAIT_SECONDS", 0.3)
    monkeypatch.setattr("k2train.record.system_info.SQUEUE_SECONDS", HANG_SECONDS)
    run = tmp_path / "run"
    with RunLock(run, {"slurm_job_id": "88"}):
        held = json.loads((run / "lease_000001.json").read_text())
    (run / "lease_000001.json").write_text(
        json.dumps(held | {"host": "node7", "boot_id": "another"})
    )
    _squeue(tmp_path / "bin", monkeypatch, body)
    lock = RunLock(run, job_ended=slurm_job_ended)
    if free:
        assert lock.acquire().taken_over_from == {
            "token": 1,
            "reason": "its SLURM job 88 has ended",
        }
        lock.release()
    else:
        with pytest.raises(RunError, match="no sign of life"):
            lock.acquire()
