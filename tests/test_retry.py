"""Retry of reads: catches a hiccup of the file system that ends a run, and an endless wait."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2train import retry
from k2train.command_line import command
from k2train.errors import UnavailableError
from k2train.files import sha256_file
from k2train.retry import is_waiting, open_retried, retried


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.001)


def failing(times: int, code: int, then: Callable[[], Any]) -> Callable[[], Any]:
    left = [times]

    def call() -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return then()

    return call


@pytest.mark.parametrize("code", sorted(retry.PASSING), ids=errno.errorcode.__getitem__)
def test_what_passes_is_waited_for(code: int, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an error of the environment that ends a run, and a wait that nobody is told of."""
    assert retried(failing(3, code, lambda: "read"), "the file") == "read"
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == f"k2train: the file: {os.strerror(code)}; trying again for 2m00s"
    assert lines[1].startswith("k2train: the file: answered after ") and len(lines) == 2


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.EROFS, errno.EISDIR])
def test_a_mistake_is_told_at_once(code: int, caplog: pytest.LogCaptureFixture) -> None:
    """Catches two minutes of patience with a name that is misspelt."""
    with pytest.raises(OSError) as error:
        retried(failing(1, code, lambda: None), "the file")
    assert error.value.errno == code and not caplog.records


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a wait for ever, and an end that a launcher does not start again (2)."""
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.05)
    seen = []

    def stale() -> None:
        seen.append(is_waiting())
        raise OSError(errno.ESTALE, "stale")

    @command
    def main(arguments: Any) -> int:
        retried(stale, "data/manifest.json")
        return 0

    assert main([]) == 1
    assert len(seen) > 2 and not any(seen) and not is_waiting()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"data/manifest.json: {os.strerror(errno.ESTALE)}, for 1s; nothing is known to be damaged: "
        "start the same command again once the file system answers"
    )


def test_the_watchdog_can_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that waits for a file server and counts as stuck."""
    asked = []
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: asked.append(is_waiting()))
    retried(failing(2, errno.EIO, lambda: None), "x")
    assert asked == [True, True] and not is_waiting()


def test_a_file_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a block that is read twice or left out, and a stale handle that is asked again."""
    path = tmp_path / "chunk"
    content = os.urandom(5 * 2**20 + 17)
    path.write_bytes(content)
    read, opened, handles, calls = os.preadv, os.open, set[int](), [0]

    def preadv(descriptor: int, *rest: Any) -> int:
        calls[0] += 1
        if calls[0] % 2:
            handles.discard(descriptor)
            raise OSError(errno.ESTALE, "stale")
        assert descriptor in handles, "a handle that failed is used again"
        return read(descriptor, *rest)

    def open_(*given: Any) -> int:
        descriptor = opened(*given)
        handles.add(descriptor)
        return descriptor

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "open", open_)
    with open_retried(path) as stream:
        assert stream.read(1000) + stream.read() == content
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()
    monkeypatch.undo()
    for descriptor in handles:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_a_read_that_never_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a file taken for the whole."""
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.01)
    path = tmp_path / "chunk"
    path.write_bytes(bytes(3 * 2**20))
    with open_retried(path) as stream:
        stream.read(2**20)

        def broken(*_: Any) -> int:
            raise OSError(errno.EIO, "bad sector")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(UnavailableError):
            stream.read()
