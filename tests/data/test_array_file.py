"""Array files: against NumPy, and files that change, end or fail while they are read."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from k2train import retry
from k2train.data.array_file import ArrayFile
from k2train.data.npy import read_header
from k2train.errors import DataError, UnavailableError

VALUES = np.arange(40 * 5, dtype="<u2").reshape(40, 5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.save(tmp_path / "a.npy", VALUES)
    return tmp_path / "a.npy"


def opened(path: Path, shape: tuple[int, ...] = (40, 5)) -> ArrayFile:
    offset = read_header(path, "a").offset
    return ArrayFile(path, offset, shape, np.dtype("<u2"), where=f"a ({path})")


def touched(path: Path, change: Callable[[Path], object]) -> None:
    """Change a file, late enough for any clock of a file system to show it."""
    time.sleep(0.02)
    change(path)


def test_it_reads_what_numpy_wrote(path: Path) -> None:
    """Catches an offset, a width or an end that is off by one."""
    array = opened(path)
    assert len(array) == 40 and array.shape == (40, 5)
    for rows in (slice(0, 40), slice(3, 7), slice(39, 40), slice(7, 7), slice(30, 99), slice(9, 2)):
        found = array[rows]
        assert found.dtype == VALUES.dtype and np.array_equal(found, VALUES[rows])
    assert np.array_equal(array[39], VALUES[39]) and array[0].tolist() == [0, 1, 2, 3, 4]
    flat = opened(path, (200,))
    assert [flat[i] for i in (0, 17, 199)] == [0, 17, 199]
    array.close()
    array.close()


def test_a_file_that_ends_early(path: Path) -> None:
    """Catches a signal without a word, and rows of zeros in place of those that are gone."""
    array = opened(path)
    os.truncate(path, os.path.getsize(path) - 13)
    with pytest.raises(DataError, match=r"^a \(.*a\.npy\): ends in row 38 of 40; it was shortened"):
        array[36:40]


def overwritten(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-3, os.SEEK_END)
        stream.write(b"\xff")


def longer(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"\xff")


@pytest.mark.parametrize("change", [overwritten, longer, lambda path: os.utime(path)])
def test_a_file_that_is_written_to(path: Path, change: Any) -> None:
    """Catches rows of which nobody knows whether they were hashed."""
    array = opened(path)
    before = array.identity()
    assert array[0:2].tolist() == VALUES[:2].tolist() and array.identity() == before
    touched(path, change)
    assert array.identity() != before and not array.identity().has_content_of(before)


def test_another_file_under_the_name(path: Path) -> None:
    """An open file stays what it is; the name is followed only after an error."""
    array = opened(path)
    before = array.identity()
    np.save(path.with_name("b.npy"), VALUES[::-1])
    touched(path, lambda path: os.replace(path.with_name("b.npy"), path))
    assert np.array_equal(array[0:40], VALUES)
    assert array.identity() != before, "its last name is gone"
    assert array.identity().has_content_of(before)


def test_a_new_owner_is_no_new_content(path: Path) -> None:
    """Catches a change that is not told, and one that is taken for new content."""
    array = opened(path)
    before = array.identity()
    touched(path, lambda path: path.chmod(0o400))
    assert np.array_equal(array[0:40], VALUES)
    assert array.identity() != before and array.identity().has_content_of(before)


def test_a_file_that_is_gone(path: Path) -> None:
    """Catches a traceback where a name or a right is missing."""
    offset = read_header(path, "a").offset
    path.unlink()
    with pytest.raises(DataError, match=r"^a: cannot be read \(No such file"):
        ArrayFile(path, offset, (40, 5), np.dtype("<u2"), where="a")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_looking_at_a_stale_handle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a handle that is asked again and again, and descriptors that stay open."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.001)
    array = opened(path)
    before, open_before, stale = array.identity(), descriptors(), {array._descriptor}
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        if descriptor in stale:
            stale.clear()
            raise OSError(errno.ESTALE, "stale")
        return real(descriptor)

    monkeypatch.setattr(os, "fstat", fstat)
    assert array.identity() == before and not stale
    assert descriptors() == open_before


def test_patience_ends_with_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an end of the run that waits two minutes for a file server."""
    stop = Event()
    array = ArrayFile(path, 128, (40, 5), np.dtype("<u2"), where="a", stop=stop)

    def failing(*_: Any) -> int:
        stop.set()
        raise OSError(errno.EIO, "away")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(UnavailableError):
        array[0:1]


def test_a_read_that_fails_for_a_moment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stale handle that is asked again, and another file taken for the one that was."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.001)
    real, left = os.preadv, [3]

    def failing(*given: Any) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "stale")
        return real(*given)

    monkeypatch.setattr(os, "preadv", failing)
    array = opened(path)
    assert np.array_equal(array[0:40], VALUES) and left == [0]
    left[0] = 1
    np.save(path.with_name("b.npy"), VALUES[::-1])
    os.replace(path.with_name("b.npy"), path)
    with pytest.raises(UnavailableError, match="another file has this name"):
        array[0:1]

    left[0] = 10**9
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 0.01)
    with pytest.raises(UnavailableError, match=r"^a \(.*a\.npy\): Stale file handle"):
        opened(path)[0:1]
