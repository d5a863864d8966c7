"""Lease of a run directory: takeover, fencing tokens, lost leases.

Would catch two owners where there is no flock, a dead holder that keeps a run, a live or a stopped
one that loses it, a token given out twice, and a holder that still writes after a takeover.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.errors import RunError
from k2train.processes import start_ticks
from k2train.run_lock import lease, process_identity
from k2train.run_lock.lock import RunLock
from k2train.run_lock.process_identity import HOST_PID_SPACE, machine_id
from tests.support.command_line import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from k2train.run_lock.lock import RunLock
lock = RunLock(sys.argv[1], flock=None).acquire()
print(lock.token, flush=True)
time.sleep(3600)
"""
RACER = """
import os, sys, time
from pathlib import Path
from k2train.errors import RunError
from k2train.run_lock.lock import RunLock
base, me, others, races = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def refused(*paths):
    raise PermissionError(1, "Operation not permitted")
if sys.argv[5] == "no links":
    os.link = refused
def everyone(name):
    (base / f"{name}.{me}").touch()
    while sum(entry.startswith(name + ".") for entry in os.listdir(base)) < others:
        time.sleep(0.0005)
for race in range(races):
    lock = RunLock(base / f"run{race}", flock=None)
    everyone(f"ready{race}")
    try:
        token = lock.acquire().token
    except RunError as error:
        assert "held by a live run" in str(error), error
        token = 0
    print(race, token, flush=True)
    everyone(f"done{race}")
    lock.release(discard_if_empty=race % 2 == 0)
"""


def _without_flock(directory: Path, **given: Any) -> RunLock:
    return RunLock(directory, flock=None, **given)


def _holder(directory: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "1\n"
    return holder


def _end(holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert holder.stdout is not None
    holder.stdout.close()


def _left_by(directory: Path, **changes: Any) -> Path:
    """A lease that was not released, of a holder that differs from this process in `changes`."""
    lock = _without_flock(directory).acquire()
    (path,) = directory.glob("lease_*.json")
    holder = json.loads(path.read_text())
    lock.release()
    path.write_text(json.dumps(holder | changes))
    return path


ELSEWHERE: dict[str, Any] = {
    "host": "node7",
    "boot_id": "another",
    "pid": 4711,
    "slurm_job_id": "88",
}


@pytest.fixture
def short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL_WAIT_SECONDS", 0.3)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine-id, which not every test machine has."""
    monkeypatch.setattr(process_identity, "machine_id", lambda: "ours")


@pytest.mark.parametrize("links", ("links", "no links"))
def test_a_hundred_races_have_one_owner_each(links: str, tmp_path: Path) -> None:
    """Without flock, for three kinds of directory: missing, released, left by a dead process.

    Also on a file system without hard links.
    """
    races, racers = 100, 4
    gone = subprocess.run(["true"], check=True)
    assert gone.returncode == 0
    for race in range(races):
        if race % 3:
            path = _left_by(tmp_path / f"run{race}", pid=2**22 + 1)
            if race % 3 == 1:
                path.write_text('{"token": 1, "released": true}')
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    running = [
        subprocess.Popen(
            [*command, str(i), str(racers), str(races), links],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(racers)
    ]
    said = [process.communicate(timeout=HANG_SECONDS)[0] for process in running]
    assert [process.returncode for process in running] == [0] * racers
    owners: dict[int, list[int]] = {race: [] for race in range(races)}
    for race, token in (map(int, line.split()) for text in said for line in text.splitlines()):
        owners[race] += [token] if token else []
    assert {len(tokens) for tokens in owners.values()} == {1}, owners
    assert all(tokens == [2 if race % 3 else 1] for race, tokens in owners.items())


def test_kill_9_frees_the_lease_at_once_and_the_token_rises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At once: the kernel knows, nobody watches a beat.
    monkeypatch.delattr(lease.Lease, "_is_renewed")
    holder = _holder(tmp_path)
    try:
        with pytest.raises(RunError, match=f"held by a live run: pid {holder.pid} on this host"):
            _without_flock(tmp_path).acquire()
        os.kill(holder.pid, signal.SIGSTOP)
        with pytest.raises(RunError, match="held by a live run"):
            _without_flock(tmp_path).acquire()
    finally:
        holder.send_signal(signal.SIGKILL)
    # Not collected yet: its id is still there, and its beginning too.
    until = time.monotonic() + HANG_SECONDS
    while start_ticks(holder.pid):
        assert time.monotonic() < until
    with _without_flock(tmp_path) as lock:
        assert lock.token == 2 and lock.taken_over_from == {
            "token": 1,
            "reason": "that process is gone",
        }
        assert f"pid {holder.pid}" in lock.takeover_message and "token 1" in lock.takeover_message
        assert [path.name for path in tmp_path.glob("lease*")] == ["lease_000002.json"]
    _end(holder)
    with _without_flock(tmp_path) as lock:
        assert lock.token == 3 and lock.taken_over_from is None and lock.takeover_message == ""


def test_a_reused_process_id_is_not_the_holder(tmp_path: Path) -> None:
    _left_by(tmp_path, began_ticks=1)
    with RunLock(tmp_path) as lock:
        assert lock.taken_over_from is not None


@pytest.mark.usefixtures("short_watch", "machine")
@pytest.mark.parametrize(
    "changes",
    [
        {"machine_id": "of another machine"},
        {"machine_id": None},
        {"host": "node7"},
        {"pid_space": "pid:[4026532999]"},
    ],
)
def test_a_silent_holder_on_a_machine_of_the_same_name_keeps_the_run(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Two machines called localhost, or two pods of one name: different boots, but no restart."""
    path = _left_by(tmp_path, **{"boot_id": "of another", "pid_space": HOST_PID_SPACE} | changes)
    with pytest.raises(RunError, match=r"no sign of life.*`mv .*\.ended`"):
        RunLock(tmp_path).acquire()
    assert path.exists()


def test_the_machine_id_is_hashed_and_none_where_it_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "machine-id"
    assert machine_id(path) is None
    for text in ("", "uninitialized\n", "0" * 32):
        path.write_text(text)
        assert machine_id(path) is None
    path.write_text("3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    found = machine_id(path)
    assert found is not None and found != path.read_text().strip() and found == machine_id(path)


@pytest.mark.usefixtures("short_watch", "machine")
def test_a_reboot_frees_the_lease_unless_its_beat_still_moves(tmp_path: Path) -> None:
    path = _left_by(tmp_path, boot_id="of yesterday", pid_space=HOST_PID_SPACE)
    with _beating(path), pytest.raises(RunError, match="held by a live run"):
        RunLock(tmp_path).acquire()
    with RunLock(tmp_path) as lock:
        assert lock.taken_over_from == {"token": 1, "reason": "its host was started again since"}


class _beating:
    """Another process that renews the lease at `path`."""

    def __init__(self, path: Path) -> None:
        self.path, self.ended = path, threading.Event()
        self.thread = threading.Thread(target=self._work)

    def __enter__(self) -> None:
        # It ends with the first beat, however late that comes on a busy machine.
        self.watch_seconds, lease.RENEWAL_WAIT_SECONDS = lease.RENEWAL_WAIT_SECONDS, HANG_SECONDS
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        lease.RENEWAL_WAIT_SECONDS = self.watch_seconds
        self.ended.set()
        self.thread.join()

    def _work(self) -> None:
        holder = json.loads(self.path.read_text())
        while not self.ended.wait(0.02):
            holder["beat"] += 1
            self.path.with_suffix(".aside").write_text(json.dumps(holder))
            os.replace(self.path.with_suffix(".aside"), self.path)


def test_a_silent_holder_on_another_host_keeps_the_run_and_the_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _left_by(tmp_path, **ELSEWHERE)
    slept: list[float] = []
    waiting = SimpleNamespace(sleep=lambda seconds: slept.append(seconds) or time.sleep(seconds))
    monkeypatch.setattr(lease, "time", waiting)
    with pytest.raises(RunError) as refused:
        RunLock(tmp_path).acquire()
    monkeypatch.undo()
    assert 0 < sum(slept) <= 2.0
    message = str(refused.value)
    command = f"mv {path} {path.with_suffix('.ended')}"
    assert "pid 4711 on another host (node7), SLURM job 88" in message and "squeue -j 88" in message
    assert f"`{command}`" in message and "\n" not in message
    subprocess.run(command.split(), check=True)
    with RunLock(tmp_path) as lock:
        assert lock.token == 2 and lock.taken_over_from == {
            "token": 1,
            "reason": "a person declared it ended",
        }


@pytest.mark.usefixtures("short_watch")
@pytest.mark.parametrize("answer", [True, False, None])
def test_slurm_is_asked_about_the_job(tmp_path: Path, answer: bool | None) -> None:
    path = _left_by(tmp_path, **ELSEWHERE)
    asked: list[str] = []

    def job_ended(job: str) -> bool | None:
        asked.append(job)
        return answer

    with _beating(path), pytest.raises(RunError, match="held by a live run"):
        RunLock(tmp_path, job_ended=job_ended).acquire()
    lock = RunLock(tmp_path, job_ended=job_ended)
    if answer is not True:
        with pytest.raises(RunError, match="no sign of life"):
            lock.acquire()
    else:
        assert lock.acquire().taken_over_from == {
            "token": 1,
            "reason": "its SLURM job 88 has ended",
        }
        lock.release()
    assert asked == ["88"]


@pytest.mark.usefixtures("short_watch")
def test_a_job_of_another_cluster_is_not_asked_about(tmp_path: Path) -> None:
    """Two clusters on one file system give the same numbers."""
    _left_by(tmp_path, **ELSEWHERE, slurm_cluster="east", slurm_restart_count="0")
    for facts in ({"slurm_job_id": 1}, {"slurm_job_id": 88, "slurm_restart_count": 3}):
        lock = RunLock(tmp_path, facts | {"slurm_cluster": "west"}, job_ended=lambda job: True)
        with pytest.raises(RunError, match="no sign of life"):
            lock.acquire()
    with RunLock(
        tmp_path, {"slurm_job_id": 1, "slurm_cluster": "east"}, job_ended=lambda job: True
    ) as lock:
        assert lock.token == 2


@pytest.mark.usefixtures("short_watch")
@pytest.mark.parametrize(("count", "free"), [(1, False), (2, True)])
def test_a_job_that_slurm_started_again_takes_over_from_itself(
    tmp_path: Path, count: int, free: bool
) -> None:
    _left_by(tmp_path, **ELSEWHERE, slurm_restart_count="1")
    lock = RunLock(
        tmp_path, {"slurm_job_id": 88, "slurm_restart_count": count}, job_ended=lambda job: False
    )
    if free:
        assert lock.acquire().token == 2
        lock.release()
    else:
        with pytest.raises(RunError, match="no sign of life"):
            lock.acquire()


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_flock_is_enough(tmp_path: Path, number: int) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(number, "no locks here")

    with RunLock(tmp_path, flock=refused) as lock:
        lock.check()
        with pytest.raises(
            RunError, match=f"pid {os.getpid()} on this host \\({socket.gethostname()}\\)"
        ):
            RunLock(tmp_path, flock=refused).acquire()


HELD: list[RunLock] = []


def _taken_by_force(directory: Path) -> None:
    (path,) = directory.glob("lease_*.json")
    path.rename(path.with_suffix(".ended"))
    HELD.append(_without_flock(directory).acquire())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (_taken_by_force, r"taken over by pid \d+ on this host.*token 2"),
        (
            lambda directory: (directory / "lease_000001.json").unlink(),
            "renamed or removed by hand",
        ),
        (
            lambda directory: (directory / "lease_000001.json").rename(
                directory / "lease_000001.ended"
            ),
            "by hand",
        ),
        (lambda directory: (directory / "lease_000009.json").write_text("{"), "a later run"),
    ],
)
def test_a_holder_that_lost_the_run_is_told(
    tmp_path: Path, how: Callable[[Path], object], said: str
) -> None:
    lock = _without_flock(tmp_path).acquire()
    lock.check()
    how(tmp_path)
    with pytest.raises(
        RunError, match=f"no longer belongs to this run \\(token 1\\).*{said}"
    ) as error:
        lock.check()
    assert "\n" not in str(error.value)
    left = {path.name for path in tmp_path.iterdir()}
    lock.release()
    assert {path.name for path in tmp_path.iterdir()} == left, (
        "the other's files are not the loser's to change"
    )
    for other in HELD:
        other.check()
        other.release()
    HELD.clear()


def test_the_beat_moves_and_ends_with_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    path = tmp_path / "lease_000001.json"
    with RunLock(tmp_path):
        first = json.loads(path.read_text())["beat"]
        until = time.monotonic() + HANG_SECONDS
        while json.loads(path.read_text())["beat"] < first + 3:
            assert time.monotonic() < until
    content = json.loads(path.read_text())
    assert content == {"token": 1, "released": True}, "what stays names no host"
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"pid": "x"}', b"[" * 1900, b"\xff" * 9, b"{}"]
)
def test_a_damaged_lease_is_one_line_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lease_000004.json").write_bytes(content)
    with pytest.raises(RunError, match=r"lease_000004\.json is damaged.*`mv .*ended`") as error:
        RunLock(tmp_path).acquire()
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "run.lock"] == [
        "lease_000004.json"
    ]


def test_a_number_that_was_given_out_and_taken_away_again_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process listed long ago and only now creates the next file.

    Others have created and left that number meanwhile.
    """
    (tmp_path / "lease_000003.json").write_text('{"token": 3, "released": true}')
    newest, looked = (
        lease.newest_lease,
        [lease.LeaseFile(1, tmp_path / "lease_000001.json", ended=False)],
    )
    monkeypatch.setattr(
        lease, "newest_lease", lambda directory: looked.pop() if looked else newest(directory)
    )
    with RunLock(tmp_path) as lock:
        assert not looked and lock.token == 4
        assert [path.name for path in tmp_path.glob("*lease*")] == ["lease_000004.json"]


def test_a_holder_that_nobody_can_read_for_now_is_no_unknown_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a refusal (2) of a run that nobody holds, because its lease could not be read."""
    path = tmp_path / "lease_000001.json"
    path.write_text("half a")
    assert lease.read_holder(path) is None

    def away(path: Path) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lease, "_first_block", away)
    code = errno.ESTALE
    with pytest.raises(OSError, match="Stale file handle"):
        lease.read_holder(path)
    code = errno.EACCES
    assert lease.read_holder(path) is None
