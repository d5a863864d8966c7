"""Atomic files on file systems that lack a call: directory fsync, hard links; hashes."""

import errno
import hashlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2train import files, retry
from k2train.files import OwnFolder, create_once, sha256_file, sync_directory, write_synced
from k2train.retry import tell_once


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "_told", set())
    yield


def refusing(number: int) -> Any:
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "number", (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF), ids=errno.errorcode.get
)
def test_a_folder_that_cannot_be_synced_is_told_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that is refused on a FUSE mount, and a line at every save."""
    real = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            refusing(number)()
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", only_files)
    with caplog.at_level(logging.WARNING):
        write_synced(tmp_path / "a", "first")
        write_synced(tmp_path / "b", "second")
    assert (tmp_path / "a").read_text() == "first" and (tmp_path / "b").read_text() == "second"
    (line,) = told(caplog)
    assert str(tmp_path) in line and os.strerror(number) in line and "power cut" in line


def test_a_folder_on_a_broken_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a failed sync that passes for a missing one: durability would be claimed."""
    monkeypatch.setattr(files.os, "fsync", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_directory(tmp_path)


@pytest.mark.parametrize("number", (0, errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK))
def test_a_file_is_created_once_with_links_and_without(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a second creator that overwrites, and a temporary file that stays."""
    if number:
        monkeypatch.setattr(files.os, "link", refusing(number))
    path, temporary = tmp_path / "one", tmp_path / "one.tmp"
    temporary.write_text("left by a start that was killed")
    with caplog.at_level(logging.WARNING):
        descriptor = create_once(path, b"first", temporary)
        second = create_once(path, b"second", temporary)
    assert descriptor is not None and second is None
    os.pwrite(descriptor, b"F", 0)
    os.close(descriptor)
    assert path.read_bytes() == b"First" and [one.name for one in tmp_path.iterdir()] == ["one"]
    assert len(told(caplog)) == bool(number)


def test_a_link_that_fails_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a disk error taken for a missing feature."""
    monkeypatch.setattr(files.os, "link", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        create_once(tmp_path / "one", b"first", tmp_path / "one.tmp")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_leaves_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an empty file of a full disk, which would name nobody for ever."""
    real = os.fsync
    monkeypatch.setattr(files.os, "link", refusing(errno.EPERM))
    calls = iter((real, refusing(errno.ENOSPC)))
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: next(calls)(descriptor))
    with pytest.raises(OSError, match="No space"):
        create_once(tmp_path / "one", b"first", tmp_path / "one.tmp")
    assert not list(tmp_path.iterdir())


def test_each_kind_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for text in ("a", "b"):
            tell_once("kind", text)
            tell_once("other", text)
    assert told(caplog) == ["k2train: a", "k2train: a"]


def test_a_hash_tells_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a large file that is hashed in silence, or of which a block is left out."""
    monkeypatch.setattr(files, "HASH_BLOCK_BYTES", 4)
    (tmp_path / "file").write_bytes(b"abcdefghij")
    calls: list[None] = []
    digest = sha256_file(tmp_path / "file", lambda: calls.append(None))
    assert digest == hashlib.sha256(b"abcdefghij").hexdigest() == sha256_file(tmp_path / "file")
    assert len(calls) == 3


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    """Catches two processes that write under one temporary name, and what a killed one has left."""
    left = tmp_path / "new" / "folder.tmp"
    left.mkdir(parents=True)
    (left / "old").touch()
    own = OwnFolder(left)
    assert list(left.iterdir()) == []
    (left / "file").touch()
    with pytest.raises(BlockingIOError):
        OwnFolder(left)
    assert (left / "file").exists()
    # Under its own name it stays.
    left.rename(tmp_path / "done")
    own.close()
    assert (tmp_path / "done" / "file").exists()
    OwnFolder(left).close()
    assert not left.exists()


def test_a_folder_without_locks_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a network file system on which nothing can be written at all."""
    monkeypatch.setattr(files.fcntl, "flock", refusing(errno.ENOLCK))
    OwnFolder(tmp_path / "folder.tmp").close()
    monkeypatch.setattr(files.fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        OwnFolder(tmp_path / "folder.tmp")


def test_a_pipe_and_an_open_file_are_written_as_they_are(tmp_path: Path) -> None:
    """Catches `--out /dev/null` that puts a file in the place of the device, for all programs."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        write_synced(pipe, "through the pipe")
        assert os.read(reader, 100) == b"through the pipe" and pipe.is_fifo()
    finally:
        os.close(reader)

    # As /dev/stdout is of a program whose output goes into a file.
    target, name = tmp_path / "target.txt", tmp_path / "stdout"
    with target.open("w", encoding="utf-8") as stream:
        stream.write("before, ")
        stream.flush()
        name.symlink_to(f"/proc/self/fd/{stream.fileno()}")
        write_synced(name, "after")
        assert name.is_symlink() and target.read_text(encoding="utf-8") == "before, after"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "stdout", "target.txt"]


@pytest.mark.parametrize("folder", [".", "/", ".."])
def test_a_folder_is_not_written_as_a_file(folder: str) -> None:
    """Catches a traceback of `--out .`, for all programs."""
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        write_synced(Path(folder), "text")


def test_a_socket_is_neither_written_nor_replaced(tmp_path: Path) -> None:
    """Catches a file in the place of a socket that a program listens on, or of a disk."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        with pytest.raises(OSError, match="no file"):
            write_synced(path, "x")
    assert path.is_socket() and [one.name for one in tmp_path.iterdir()] == ["s"]
