"""Process identity and liveness: reused ids, zombies, stopped processes, other machines."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from k2train.processes import (
    Process,
    descendants,
    exists,
    live_processes,
    peak_resident_bytes,
    process_state,
    read_stat,
    start_ticks,
    this_process,
)
from tests.support.command_line import soon

ELSEWHERE = Process(1, 1, "another boot", "pid:[1]", "n2")


def test_processes_are_told_apart() -> None:
    """Catches a reused id, another boot and another container taken for the same process."""
    me = this_process()
    assert me == this_process() and me.pid == os.getpid() and me.start_ticks > 0
    assert process_state(me, me) == "running"
    assert process_state(replace(me, start_ticks=me.start_ticks + 1), me) == "gone"
    assert process_state(ELSEWHERE, me) == ""
    assert process_state(replace(me, pid_namespace="pid:[1]"), me) == ""
    assert process_state(replace(me, boot_id=""), replace(me, boot_id="")) == ""


def test_a_zombie_is_gone_although_its_id_is_taken() -> None:
    """Catches a process waited for although it has ended, because nobody has reaped it."""
    me = this_process()
    with subprocess.Popen(["sleep", "600"]) as child:
        other = replace(me, pid=child.pid, start_ticks=start_ticks(child.pid))
        assert process_state(other, me) == "running"
        child.kill()
        assert soon(lambda: process_state(other, me) == "gone")
        assert exists(child.pid) and start_ticks(child.pid) == 0
        assert child.pid not in live_processes()
    assert not exists(child.pid) and read_stat(child.pid) is None


TRACED = """
import ctypes, os, signal
assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0, "PTRACE_TRACEME"
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_debugger_does_not_look_like_a_stop() -> None:
    """Catches a rank ended as stopped (SIGSTOP) because somebody looks at its stacks."""
    me = this_process()
    child = subprocess.Popen([sys.executable, "-c", TRACED])
    try:
        other = replace(me, pid=child.pid, start_ticks=start_ticks(child.pid))
        assert soon(lambda: process_state(other, me) == "traced")
    finally:
        os.kill(child.pid, signal.SIGKILL)
        while not os.WIFSIGNALED(os.waitpid(child.pid, 0)[1]):
            pass
        child.returncode = -9


@pytest.mark.parametrize("name", ["plain", "a b", "x) Z 1 1", ") ("])
def test_names_are_read_whatever_is_in_them(tmp_path: Path, name: str) -> None:
    """Catches a field that is read from a process name with spaces and parentheses."""
    program = tmp_path / name
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as child:
        assert soon(lambda: read_stat(child.pid) is not None and named(child.pid) == name)
        stat = read_stat(child.pid)
        assert stat is not None and stat.state in "RS" and stat.parent == os.getpid()
        assert stat.group == os.getpgid(child.pid)
        child.kill()


def named(pid: int) -> str:
    stat = read_stat(pid)
    return "" if stat is None else stat.name


def test_descendants_are_children_and_theirs() -> None:
    """Catches a grandchild that is left out, and a stranger that is taken in."""
    program = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program]) as child:
        try:
            assert soon(lambda: len(descendants([child.pid])) == 1)
            (grandchild,) = descendants([child.pid])
            found = descendants([os.getpid()])
            assert found.index(child.pid) < found.index(grandchild)
            assert os.getpid() not in found and os.getppid() not in found
        finally:
            for pid in descendants([child.pid]):
                os.kill(pid, 9)
            child.kill()


def refused(number: int) -> Callable[..., bytes]:
    def read(path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    return read


@pytest.mark.parametrize(("error", "gone"), [("ENOENT", True), ("ESRCH", True), ("EMFILE", False)])
def test_what_cannot_be_read_is_not_gone(error: str, gone: bool) -> None:
    """Catches a live holder taken for dead because this process has no descriptor left."""
    me = this_process()
    with mock.patch.object(Path, "read_bytes", refused(getattr(errno, error))):
        if gone:
            assert process_state(me, me) == "gone"
        else:
            with pytest.raises(OSError, match="open files"):
                process_state(me, me)


def test_start_times_are_in_order() -> None:
    """Catches another field read as the start time."""
    with subprocess.Popen(["sleep", "600"]) as first:
        time.sleep(0.05)
        with subprocess.Popen(["sleep", "600"]) as second:
            assert start_ticks(os.getpid()) <= start_ticks(first.pid) < start_ticks(second.pid)
            second.kill()
        first.kill()


def test_the_peak_of_memory_is_in_bytes() -> None:
    """Catches kibibytes told as bytes, and a child whose peak begins at its parent's."""
    held = bytearray(os.urandom(1)) * 2**26
    assert peak_resident_bytes() > len(held)
    program = "from k2train.processes import peak_resident_bytes; print(peak_resident_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert 2**20 < int(done.stdout) < len(held)
