"""Retry of reads: catches a hiccup of the file system that ends a run, and an endless wait."""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train import retry
from k2train.command_line import command
from k2train.errors import UnavailableError
from k2train.files import sha256_file
from k2train.retry import (
    exists,
    exists_retried,
    is_file_retried,
    is_folder_retried,
    is_link_retried,
    is_waiting,
    list_retried,
    open_retried,
    retried,
    stat_retried,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.001)
    log = logging.getLogger(retry.__name__)
    before = log.level
    # Other tests of this process may have begun as the second process of a machine.
    retry.tell_only(first=True)
    yield
    log.setLevel(before)


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


def test_a_read_of_an_array_is_whole_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error that is taken for the end of the file, as numpy.fromfile does."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(200)))
    failing, preadv = [errno.EIO, errno.ESTALE], os.preadv

    def struck(descriptor: int, buffers: Any, at: int) -> int:
        if at >= 64 and failing:
            raise OSError(failing[0], os.strerror(failing.pop(0)))
        return preadv(descriptor, [buffers[0][:64]], at)

    monkeypatch.setattr(os, "preadv", struck)
    assert retry.read_retried(path) == bytes(range(200)) and not failing
    assert retry.read_retried(path, 10, 100) == bytes(range(10, 110))
    assert retry.read_retried(path, 200) == b""
    with pytest.raises(EOFError, match="numbers ends 1 bytes early"):
        retry.read_retried(path, 100, 101)


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


class Looks:
    """`os.stat`, `os.lstat` and `os.listdir`, of which the next `failing` fail with `code`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing, self.code = 0, errno.ESTALE
        for name in ("stat", "lstat", "listdir"):
            monkeypatch.setattr(os, name, partial(self._call, getattr(os, name)))

    def _call(self, real: Callable[..., Any], *given: Any) -> Any:
        if self.failing:
            self.failing -= 1
            raise OSError(self.code, os.strerror(self.code))
        return real(*given)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_looks_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Catches an error that counts as "not there": in each answer, and for what is not there."""
    file, folder, gone = tmp_path / "b", tmp_path / "a", tmp_path / "gone"
    file.write_bytes(b"123")
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to(gone)
    looks = Looks(monkeypatch)
    looks.code = code
    answers: list[tuple[Callable[[Path], Any], Path, Any]] = [
        *((exists_retried, path, path is not gone) for path in (file, folder, gone)),
        *((is_file_retried, path, path is file) for path in (file, folder, gone)),
        *((is_folder_retried, path, path is folder) for path in (file, folder, gone)),
        *((is_link_retried, path, path is link) for path in (file, folder, gone, link)),
        # What is below a file is not there, either.
        (exists_retried, file / "inside", False),
        (list_retried, tmp_path, [folder, file, link]),
        (lambda path: getattr(stat_retried(path), "st_size", None), file, 3),
        (stat_retried, gone, None),
    ]
    for ask, path, expected in answers:
        looks.failing = 2
        assert ask(path) == expected, (ask, path)
        assert looks.failing == 0


def test_looks_that_never_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.01)
    looks = Looks(monkeypatch)
    for ask in (exists_retried, is_file_retried, is_folder_retried, is_link_retried, list_retried):
        looks.failing = 10**9
        with pytest.raises(UnavailableError, match="Stale file handle"):
            ask(tmp_path)
    # Who tries again by itself gets the error, and no answer.
    with pytest.raises(OSError, match="Stale file handle"):
        exists(tmp_path)


def test_a_look_that_is_forbidden_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = Looks(monkeypatch)
    looks.code = errno.EACCES
    for ask in (exists, exists_retried, list_retried):
        looks.failing = 1
        with pytest.raises(PermissionError):
            ask(tmp_path)
    looks.failing, looks.code = 1, errno.ELOOP
    assert not exists(tmp_path)


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


@pytest.mark.parametrize(
    ("number", "files", "free", "told"),
    (
        (errno.ENOSPC, 100, 0, True),
        (errno.ENOSPC, 100, 1, False),
        (errno.ENOSPC, 0, 0, False),
        (errno.EACCES, 100, 0, False),
    ),
)
def test_a_disk_whose_inodes_are_used_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    files: int,
    free: int,
    told: bool,
) -> None:
    """Catches "no space left" where `df` shows room; file systems without such a table count 0."""
    facts = SimpleNamespace(f_files=files, f_favail=free)
    monkeypatch.setattr(retry.os, "statvfs", lambda path: facts)
    error = OSError(number, os.strerror(number))
    for path in (tmp_path, tmp_path / "not" / "there"):
        text = retry.reason(error, path)
        assert text.startswith(os.strerror(number)) and ("inodes are used up" in text) == told
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.0)
    if number == errno.ENOSPC:

        def full() -> None:
            raise error

        with pytest.raises(UnavailableError) as caught:
            retry.retried(full, tmp_path / "run.lock")
        assert ("df -i" in str(caught.value)) == told


def test_a_disk_that_does_not_answer_is_not_called_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(path: Path) -> None:
        raise OSError(errno.EIO, "away")

    monkeypatch.setattr(retry.os, "statvfs", away)
    assert retry.reason(OSError(errno.ENOSPC, "No space"), "/") == "No space"
