"""`evaluation/code_sandbox.py`: catches programs that get out, go on, or are told as passed.

The limits here are of CPU seconds or of what is counted; the wall limit of those that sleep is
short, and nothing depends on how soon it comes.
"""

import json
import os
import platform
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from k2train.errors import UserError
from k2train.evaluation import code_sandbox
from k2train.evaluation.code_sandbox import Limits, Outcome, Sandbox
from k2train.evaluation.code_sandbox_calls import ARCHITECTURES, REFUSED, refused_calls
from tests.support.command_line import soon

LIMITS = Limits(cpu_seconds=1, wall_seconds=600.0, folder_bytes=2**20)
HASTY = Limits(cpu_seconds=1, wall_seconds=1.5, folder_bytes=2**20)


STRONG, WEAK = "namespaces", "limits and audit hook"


@pytest.fixture(scope="module")
def levels() -> dict[str, Sandbox]:
    """What this machine has; the weak one it always has.

    Asked for by a test and not by the collection, which has to be the same in every worker.
    """
    found = Sandbox.open(LIMITS, allow_weak=True)
    return {level.protection: level for level in (found, Sandbox(LIMITS, False))}


@pytest.fixture(params=(STRONG, WEAK))
def sandbox(request: pytest.FixtureRequest, levels: dict[str, Sandbox]) -> Sandbox:
    if request.param not in levels:
        pytest.skip("this machine allows no namespaces")
    return levels[request.param]


NAP = f"1000000.{os.getpid()}"
"""Seconds that no other process sleeps, of a run of tests beside this one neither."""
HONEST = """
import collections, itertools, json, math, re, tempfile, threading, typing
open("note.txt", "w").write("x")
with tempfile.TemporaryFile() as stream:
    stream.write(b"y")
thread = threading.Thread(target=print, args=("z",))
thread.start(); thread.join()
assert math.gcd(12, 18) == 6
"""
FAILING = {
    "assert 1 == 2, 'not equal'": Outcome("failed", "AssertionError: not equal"),
    "def f(:": Outcome("failed", "SyntaxError: invalid syntax (<program>, line 1)"),
    "import sys; sys.exit(0)": Outcome("failed", "SystemExit: 0"),
    "raise KeyboardInterrupt": Outcome("failed", "KeyboardInterrupt: "),
    "import os; os._exit(0)": Outcome("ended", "without a verdict, exit code 0"),
    "print('passed')\nimport os; os._exit(0)": Outcome("ended", "without a verdict, exit code 0"),
    "import numpy": Outcome("failed", "ModuleNotFoundError: No module named 'numpy'"),
    "import k2train": Outcome("failed", "ModuleNotFoundError: No module named 'k2train'"),
    "x = bytearray(2**31)": Outcome("failed", "MemoryError: "),
    # Few and large: many small ones may take more than the second of CPU.
    "x = []\nwhile True: x.append(bytearray(2**28))": Outcome("failed", "MemoryError: "),
    "while True: pass": Outcome("time", "more than 1 s of CPU"),
    "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass": Outcome(
        "time", "more than 1 s of CPU"
    ),
    "while True:\n try:\n  while True: pass\n except BaseException: pass": Outcome(
        "time", "more than 1 s of CPU"
    ),
    "while True: print('x' * 1000)": Outcome("output", "more than 65,536 bytes printed"),
    "open('large', 'wb').write(bytes(2**21))": Outcome(
        "failed", "OSError: [Errno 27] File too large"
    ),
}


def test_an_honest_program_passes(sandbox: Sandbox) -> None:
    """Catches a wall that keeps programs from what they may do."""
    assert sandbox.run(HONEST) == Outcome("passed")


@pytest.mark.parametrize("source", FAILING)
def test_a_program_does_not_pass_because(sandbox: Sandbox, source: str) -> None:
    """Catches a program that leaves early, never ends, or takes too much, and is told as passed."""
    assert sandbox.run(source) == FAILING[source]


def test_one_that_sleeps_is_ended(levels: dict[str, Sandbox]) -> None:
    """Catches a program that uses no CPU and never ends."""
    for level in levels.values():
        outcome = Sandbox(HASTY, level.namespaces).run("import time\ntime.sleep(1e6)")
        assert outcome == Outcome("time", "more than 1.5 s by the clock")


def test_one_that_never_stops_writing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a program whose pipe is always ready, so that the clock is never looked at."""

    class AlwaysReady(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            return super().select(600.0)

    monkeypatch.setattr(code_sandbox.selectors, "DefaultSelector", AlwaysReady)
    limits = Limits(cpu_seconds=4, wall_seconds=0.5, output_bytes=2**60)
    outcome = Sandbox(limits, False).run("while True: print('x' * 65536)")
    assert outcome == Outcome("time", "more than 0.5 s by the clock")


def test_a_program_whose_caller_is_gone_does_not_begin(tmp_path: Path) -> None:
    """Catches a caller killed while its child starts: nobody would end that program."""
    job = {
        **asdict(LIMITS),
        "namespaces": False,
        "folder": str(tmp_path),
        "source": "open('begun', 'w')",
        "secret": "",
    }
    for caller, begun in ((os.getppid(), False), (os.getpid(), True)):
        reading, writing = os.pipe()
        program = [sys.executable, *code_sandbox.FLAGS, str(code_sandbox.CHILD)]
        done = subprocess.run(
            [*program, str(writing), str(caller)],
            input=json.dumps(job).encode(),
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        os.close(reading)
        assert done.returncode == 0 and (tmp_path / "begun").exists() is begun


@pytest.fixture
def outside() -> Iterator[Path]:
    """A file outside that every user may read and write."""
    with tempfile.TemporaryDirectory(prefix="k2train_outside_") as folder:
        Path(folder).chmod(0o777)
        file = Path(folder) / "outside.txt"
        file.write_text("a secret")
        file.chmod(0o666)
        yield file


@pytest.mark.parametrize(
    "deed",
    (
        "open({0!r}, 'w').write('changed')",
        "open({0!r}, 'a').write('changed')",
        "import os; os.remove({0!r})",
        "import os; os.rename({0!r}, 'mine')",
        "import os; os.symlink({0!r}, 'link'); open('link', 'w').write('changed')",
        "import os; os.chmod({0!r}, 0)",
        "import os; os.mkdir({0!r} + 'x')",
        "import os; os.close(os.open({0!r}, os.O_RDWR))",
        "print(open({0!r}).read())",
        "import os; print(os.stat('.')); os.listdir(os.path.dirname({0!r}))",
    ),
)
def test_nothing_outside_is_touched(sandbox: Sandbox, outside: Path, deed: str) -> None:
    """Catches a program that reads, writes or removes a file of its user."""
    outcome = sandbox.run(deed.format(str(outside)))
    assert outcome.kind == "failed", outcome
    assert outside.read_text() == "a secret" and outside.stat().st_mode & 0o777 == 0o666
    assert [path.name for path in outside.parent.iterdir()] == ["outside.txt"]


def test_its_folder_is_gone_afterwards(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches folders that pile up, of programs that passed and of those that were killed."""
    monkeypatch.setattr(code_sandbox.tempfile, "tempdir", str(tmp_path))
    assert sandbox.run("open('note', 'w').write('x')").passed
    assert sandbox.run("open('note', 'w')\nwhile True: print('x' * 1000)").kind == "output"
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a token that a program finds, in its own environment or its parents'."""
    monkeypatch.setenv("SECRET_TOKEN", "open sesame")
    assert sandbox.run("import os; assert set(os.environ) == {'PYTHONHASHSEED', 'LC_ALL'}").passed
    looks = (
        "import os\nfor pid in (os.getppid(), {0}, 'self'):\n"
        " try: text = open(f'/proc/{{pid}}/environ', 'rb').read()\n except OSError: continue\n"
        " assert b'sesame' not in text, 'found'"
    )
    assert sandbox.run(looks.format(os.getpid())).passed


def test_there_is_no_network(sandbox: Sandbox) -> None:
    """Catches a program that reaches a server of this very machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        port = server.getsockname()[1]
        dial = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        assert sandbox.run(dial).kind == "failed"
        with pytest.raises(BlockingIOError):
            server.accept()


def _running(*marks: str) -> Iterator[int]:
    """Processes with one of these in their command lines, which forked ones keep."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                line = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if any(mark.encode() in line for mark in marks):
                yield int(path.name)


@pytest.mark.parametrize(
    "deed",
    (
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
        "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(1e6)",
        "import os\nos.kill(os.getppid(), 9); os.kill(1, 9); os.killpg(0, 9); os.kill(-1, 9)",
        "import os\nwhile os.getppid() != 1: os.kill(os.getppid(), 9)\nos.kill(-1, 9)",
        f"import subprocess\nsubprocess.Popen(['sleep', '{NAP}'], start_new_session=True)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,)).start()",
    ),
    ids=("fork bomb", "daemon", "kills parents", "kills all", "subprocess", "thread"),
)
def test_no_process_is_left(level_mark: str, sandbox: Sandbox, deed: str) -> None:
    """Catches a daemon, a fork bomb, and a program that kills who watches it."""
    Sandbox(HASTY, sandbox.namespaces).run(deed)
    assert soon(lambda: not list(_running(level_mark, NAP))), "processes are left"


@pytest.fixture
def level_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A path in the command line of every process of this test's programs."""
    copy = tmp_path / "code_sandbox_child.py"
    copy.write_text(code_sandbox.CHILD.read_text())
    monkeypatch.setattr(code_sandbox, "CHILD", copy)
    return str(copy)


@pytest.mark.parametrize("sandbox", (STRONG,), indirect=True)
def test_a_program_behind_the_wall_has_no_privileges(sandbox: Sandbox) -> None:
    """Catches capabilities that are kept: with one it mounts, or makes namespaces that have all."""
    call = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(name, *rest): return getattr(libc, name)(*rest), ctypes.get_errno()\n"
    )
    refused = (
        "assert call('unshare', 0x10000000) == (-1, 1), 'user namespace'\n"
        "assert call('mount', b'x', b'/program', b'tmpfs', 0, None) == (-1, 1), 'mount'\n"
        "assert call('chroot', b'/program') == (-1, 1), 'chroot'\n"
        "assert call('setuid', 0)[0] == -1, 'root'\n"
    )
    assert sandbox.run(call + refused) == Outcome("passed")
    filled = "for n in range(3): open(str(n), 'wb').write(bytes(2**19))"
    assert sandbox.run(filled).detail == "OSError: [Errno 28] No space left on device"
    assert sandbox.run("import os; assert os.listdir('/proc') == []").kind == "failed"


@pytest.mark.parametrize("sandbox", (STRONG,), indirect=True)
def test_no_memory_beside_the_limits_and_no_key(sandbox: Sandbox) -> None:
    """Catches memory that no limit counts, and the user's keys, which each child inherits."""
    assert refused_calls("a machine of tomorrow") == b""
    column, _ = ARCHITECTURES[platform.machine()]
    numbers = [pair[column] for pair in REFUSED.values()]
    source = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.shmget(0, 4096, 0o1600) == -1, 'segment'\n"
        f"for number in {numbers}:\n"
        " answer = libc.syscall(number, *[ctypes.c_long(-1)] * 6), ctypes.get_errno()\n"
        " assert answer == (-1, 1), (number, answer)\n"
        "assert libc.syscall({0}) == os.getpid(), 'others are allowed'\n"
    )
    own_id = {"x86_64": 39, "aarch64": 172}[platform.machine()]
    assert sandbox.run(source.replace("{0}", str(own_id))) == Outcome("passed")
    if platform.machine() == "x86_64":
        twin = f"assert libc.syscall({2**30 + 39}) == -1 and ctypes.get_errno() == 1"
        assert sandbox.run(source.split("assert")[0] + twin) == Outcome("passed")


def test_a_child_that_goes_on_has_no_say(sandbox: Sandbox) -> None:
    """Catches a verdict of a forked child, when the program itself failed."""
    source = "import os, time\nif os.fork():\n time.sleep(0.2)\n raise ValueError('parent')"
    assert sandbox.run(source).kind == "failed"


def test_outcomes_are_in_order(sandbox: Sandbox) -> None:
    """Catches the outcome of one program beside another."""
    sources = [f"assert {number % 3}, {number}" for number in range(7)]
    outcomes = sandbox.run_all(sources, workers=3)
    assert [one.passed for one in outcomes] == [bool(number % 3) for number in range(7)]
    assert outcomes[3].detail == "AssertionError: 3"


def test_without_a_wall_it_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches programs that run unprotected without a word."""
    run = Sandbox.run

    def without(self: Sandbox, source: str) -> Outcome:
        return Outcome("ended", "unshare: no") if self.namespaces else run(self, source)

    monkeypatch.setattr(Sandbox, "run", without)
    with pytest.raises(UserError, match=r"unshare: no.*--weak-sandbox"):
        Sandbox.open()
    weak = Sandbox.open(allow_weak=True)
    assert weak.protection == "limits and audit hook" and weak.reason == "unshare: no"
    assert weak.run("pass").passed
