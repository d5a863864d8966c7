"""Who listens at the port where nodes meet: another program is told at once, a launcher is not."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2train.errors import EXIT_FAILED
from k2train.launch.__main__ import main
from k2train.launch.ports import taken_by
from k2train.launch.rendezvous import meeting_port

LISTEN = """
import socket, sys
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen()
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other() -> Iterator[tuple[int, int]]:
    """Port and process of another program that listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", LISTEN, "server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield int(process.stdout.readline()), process.pid
    process.communicate()


def test_another_program_is_named(other: tuple[int, int]) -> None:
    port, pid = other
    assert taken_by(port, os.getpid()).startswith(f"pid {pid} (")


def test_a_free_port_and_ones_own_are_not_taken() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert taken_by(port, os.getpid()) == ""
        listener.listen()
        assert taken_by(port, os.getpid()) == ""
        assert taken_by(port, 1) != ""


def proc_of(root: Path, line: bytes | None) -> Path:
    """A /proc in which port 4660 (0x1234) is listened to; by a process with that command line."""
    head = "  sl  local_address rem_address st tx rx tr tm retrnsmt uid timeout inode\n"
    rows = (
        "   0: 0100007F:1234 00000000:0000 0A 0:0 0:0 0 0 0 777\n"
        "   1: 0100007F:1235 00000000:0000 01 0:0 0:0 0 0 0 778\n"
    )
    (root / "net").mkdir(parents=True)
    (root / "net" / "tcp").write_text(head + rows)
    if line is not None:
        (root / "5" / "fd").mkdir(parents=True)
        (root / "5" / "fd" / "3").symlink_to("socket:[777]")
        (root / "5" / "cmdline").write_bytes(line)
    return root


@pytest.mark.parametrize(
    ("line", "expected"),
    (
        (b"python\0-m\0k2train.launch\0--nnodes\0002", ""),
        (b"/usr/bin/python\0/usr/bin/k2train\0launch\0--nnodes\0002", ""),
        (b"/usr/bin/python\0/usr/bin/torchrun", ""),
        (b"nginx\0", "pid 5 (nginx)"),
        # Another container's, or another user's.
        (None, ""),
    ),
)
def test_a_launcher_may_hold_it(tmp_path: Path, line: bytes | None, expected: str) -> None:
    """Catches two launchers of one machine that refuse each other."""
    proc = proc_of(tmp_path, line)
    assert taken_by(0x1234, 1, proc) == expected
    assert taken_by(0x1235, 1, proc) == "", "a connection, nobody listens"


@pytest.mark.parametrize(
    ("backend", "endpoint", "conf", "expected"),
    (
        ("c10d", "127.0.0.1:29611", "", 29611),
        ("c10d", "localhost", "", 29400),
        ("c10d", "elsewhere.example:29611", "is_host=true,read_timeout=300", 29611),
        ("c10d", "127.0.0.1:29611", "is_host=false", None),
        ("static", "127.0.0.1:29611", "", None),
        ("c10d", "127.0.0.1:many", "", None),
        ("c10d", "127.0.0.1:29611", "nonsense", None),
    ),
)
def test_the_port_that_this_machine_would_open(
    backend: str, endpoint: str, conf: str, expected: int | None
) -> None:
    assert meeting_port(backend, endpoint, conf) == expected


def test_a_taken_port_is_one_line(
    other: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a minute of waiting, two backtraces, and an error that does not name the port."""
    port, _ = other
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    assert main([*meeting, "-m", "k2train.train", "c.yaml"]) == EXIT_FAILED
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"port {port} of" in error and "is taken by pid" in error
