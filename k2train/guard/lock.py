"""One live process a run directory: `run.lock`, held with flock for as long as the process lives.

The kernel frees the lock when the holder ends in whatever way, kill -9 included, so there is no stale lock and no
"remove this file by hand". A file that merely exists, or a process id that is asked for, is refused: both lie after a
crash, and an id may belong to another program by then. The JSON in the file is for people: who to look for.
Taking the lock may have to make the directory; a start that then fails on a mistake gives it back, so that bad input
leaves nothing behind.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from k2train.errors import RunError

LOCK_NAME = "run.lock"


class RunLock:
    """The lock of one run directory; use `acquire` and `release`, or a with statement."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.path = self.directory / LOCK_NAME
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._made_file = False

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> Self:
        """Take the lock without waiting, making the directory if it is missing.

        Raises RunError, in well under a second, when another live process holds it, naming that process; or when the
        directory cannot be made or its file system cannot lock. In each case nothing new is left on the disk.
        """
        assert self._descriptor is None, f"{self.path} is held by this object already"
        try:
            self._descriptor = self._open_locked()
            self._write_holder()
        except BlockingIOError:
            # Whatever we made on the way is the holder's directory now.
            self._made = []
            raise RunError(self._held_by_another()) from None
        except OSError as error:
            self._give_up()
            raise RunError(
                f"{self.path} cannot be locked: {error.strerror}; choose another run.directory, on a file system that "
                "you may write to and that supports flock"
            ) from None
        _close_in_forked_children(self)
        return self

    def release(self, discard_if_empty: bool = False) -> None:
        """Free the lock; harmless when not held.

        With `discard_if_empty`, what `acquire` made is removed again: the lock file, and the directory and its parents
        where nothing else lies in them.
        """
        if self._descriptor is None:
            return
        if discard_if_empty:
            self._remove_made()
        else:
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None
        self._made = []

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _open_locked(self) -> int:
        while True:
            self._make_directory()
            self._made_file = not self.path.exists()
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_file(descriptor, self.path):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            # The holder discarded its directory between our open and our lock: what we locked has no name any more.
            os.close(descriptor)

    def _make_directory(self) -> None:
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        for path in reversed(missing):
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():
                    raise
            else:
                self._made.append(path)

    def _write_holder(self) -> None:
        assert self._descriptor is not None, "nothing to write to"
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": _boot_id(), "start_time": _now()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode() + b"\n", 0)

    def _give_up(self) -> None:
        self._remove_made()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
        self._made = []

    def _remove_made(self) -> None:
        # The name goes while the lock is still held, so that nobody can take a lock that is about to lose its name.
        # What cannot be removed, because another run moved in or the disk refuses, stays: tidying must not raise.
        with contextlib.suppress(OSError):
            if self._made_file:
                self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in reversed(self._made):
                path.rmdir()

    def _held_by_another(self) -> str:
        holder = _read_holder(self.path)
        if holder is None:
            return (
                f"{self.directory} is held by a live run that has not said who it is; wait, or choose another run.name"
            )
        where = "this host" if holder.get("boot_id") == _boot_id() else "another host"
        return (
            f"{self.directory} is held by a live run: pid {holder.get('pid')} on {where} ({holder.get('host')}) "
            f"since {holder.get('start_time')}; stop it with `kill -TERM {holder.get('pid')}` there (it saves first), "
            "or choose another run.name or run.directory"
        )


def _read_holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; tried for a moment, since the holder writes its name just after it takes the lock."""
    for _ in range(10):
        try:
            holder = json.loads(path.read_bytes())
        except (OSError, ValueError):
            time.sleep(0.03)
            continue
        return holder if isinstance(holder, dict) else None
    return None


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _close_in_forked_children(lock: RunLock) -> None:
    """A forked child shares the lock; if it outlived a killed parent, it would keep the run locked for nobody."""
    reference = weakref.ref(lock)

    def close() -> None:
        held = reference()
        if held is not None and held._descriptor is not None:
            os.close(held._descriptor)
            held._descriptor = None

    os.register_at_fork(after_in_child=close)


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
