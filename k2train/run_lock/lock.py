"""Run lock: `run.lock` is held with flock for the life of the process, with a lease beside it.

- The kernel frees the lock when the holder ends in any way, kill -9 included. There is no stale
  lock and no "remove this file by hand".
- The JSON in the file is for people: it names the holder.
- flock does not reach other hosts on some file systems, and others refuse it. There the lease
  decides (see `lease`), which also provides the fencing token. Both are always taken, the lock
  first, so users need not know their file system.
- Taking the lock may create the directory. A start that then fails on a user's mistake removes it
  again, so bad input leaves nothing behind.

Alternatives considered:
- The existence of a file, or a process id, as the lock: both remain after a crash, and the id may
  belong to another program by then.
"""

import contextlib
import errno
import fcntl
import json
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from k2train.errors import RunError
from k2train.retry import exists, is_passing, reason, retried
from k2train.run_lock.lease import NAME, Lease, held_message, read_holder
from k2train.run_lock.process_identity import JobEnded, ProcessIdentity, own_identity

LOCK_NAME = "run.lock"
NO_FLOCK = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
"""Error numbers of file systems without flock."""


class RunLock:
    """Lock of one run directory; use `acquire` and `release`, or a with statement.

    - `facts` about the job (`slurm_job_id`, `slurm_restart_count`) are stored for others.
    - `job_ended` asks SLURM whether another job has ended.
    - `flock` None: run without it, as on a file system that has none.
    """

    def __init__(
        self,
        directory: str | Path,
        facts: Mapping[str, object] | None = None,
        job_ended: JobEnded | None = None,
        flock: Callable[[int, int], None] | None = fcntl.flock,
    ) -> None:
        self.directory = Path(directory)
        self.path = self.directory / LOCK_NAME
        self.facts = dict(facts or {})
        self._flock = flock
        self._lease = Lease(self.directory, self.facts, job_ended)
        self._descriptor: int | None = None
        self._created_directories: list[Path] = []
        self._created_file = False
        self._step = ""
        """What failed, should the next call of the file system do so."""

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    @property
    def token(self) -> int:
        """Fencing token, higher than that of every earlier holder. 0 while not held."""
        return self._lease.token if self.held else 0

    @property
    def taken_over_from(self) -> dict[str, Any] | None:
        """`{token, reason}` of an earlier holder that did not release the run.

        It goes to the ledger, so no host is named.
        """
        return self._lease.taken_over_from

    @property
    def takeover_message(self) -> str:
        """The same as a message with host and pid; "" after a clean end."""
        return self._lease.takeover_message

    def check(self) -> None:
        """Raise RunError when the run has another owner.

        Call before any action that two jobs must not both do.
        """
        assert self.held, f"{self.path} is not held"
        self._lease.check()

    def acquire(self) -> Self:
        """Take the lock without waiting, creating the directory if missing.

        Raises RunError when another process that may be alive holds it, naming that process, or
        when the directory cannot be created or written. This takes at most two seconds, plus 1.5 s
        for SLURM's answer. An error of the file system that may pass is tried again; then it is an
        UnavailableError. In each case nothing new is left on the disk.
        """
        return retried(self._acquire, self.path)

    def _acquire(self) -> Self:
        assert self._descriptor is None, f"{self.path} is held by this object already"
        try:
            while not self._try_acquire():
                pass
            self._write_holder()
        except RunError:
            # The directory belongs to the other holder now, whichever of us created it.
            self._created_directories, self._created_file = [], False
            self._undo()
            raise
        except BlockingIOError:
            # The directories created on the way belong to the holder now.
            self._created_directories = []
            raise RunError(self._held_by_another()) from None
        except OSError as error:
            self._undo()
            if is_passing(error):
                raise
            # What failed is said of the step that failed: the lock may be fine.
            raise RunError(
                f"{self._step}: {reason(error, self.directory)}; choose another run.directory, on "
                "a file system that you may write to"
            ) from None

        _close_in_forked_children(self)
        return self

    def release(self, discard_if_empty: bool = False) -> None:
        """Free the lock; no effect when not held.

        With `discard_if_empty`, removes what `acquire` created: the lock file, and the directory
        and its parents if they are otherwise empty.
        """
        if self._descriptor is None:
            return

        if discard_if_empty and self._lease.first and self._holds_only_lock_files():
            self._lease.drop()

        self._lease.release()
        if discard_if_empty:
            self._remove_created()
        else:
            os.ftruncate(self._descriptor, 0)

        os.close(self._descriptor)
        self._descriptor = None
        self._created_directories = []

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try_acquire(self) -> bool:
        """Take lock and lease; False when the directory disappeared in between, to be retried."""
        self._descriptor = self._open_locked()
        self._step = f"no lease can be written in {self.directory}"
        try:
            self._lease.take()
        except FileNotFoundError:
            os.close(self._descriptor)
            self._descriptor = None
            return False
        return True

    def _holds_only_lock_files(self) -> bool:
        return all(
            path == self.path or NAME.fullmatch(path.name) for path in self.directory.iterdir()
        )

    def _open_locked(self) -> int:
        while True:
            self._step = f"{self.directory} cannot be created"
            self._make_directory()
            self._step = f"{self.path} cannot be locked"
            # Only a file that this start created may be removed when it fails.
            self._created_file = not exists(self.path)
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue

            try:
                self._try_flock(descriptor)
                if _is_file(descriptor, self.path):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise

            # The holder removed its directory between open and lock, so the locked file has no name
            # any more.
            os.close(descriptor)

    def _try_flock(self, descriptor: int) -> None:
        if self._flock is None:
            return
        try:
            self._flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise

    def _make_directory(self) -> None:
        missing = [path for path in (self.directory, *self.directory.parents) if not exists(path)]
        for path in reversed(missing):
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():
                    raise
            else:
                self._created_directories.append(path)

    def _write_holder(self) -> None:
        assert self._descriptor is not None, "nothing to write to"
        self._step = f"{self.path} cannot be written"
        holder = own_identity(self.facts) | {"token": self._lease.token}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode() + b"\n", 0)

    def _undo(self) -> None:
        if self._lease.first:
            self._lease.drop()
        self._lease.release()
        self._remove_created()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
        self._created_directories = []

    def _remove_created(self) -> None:
        # Remove the name while the lock is held, so that no process can lock a file about to lose
        # its name.
        # Files that cannot be removed, because another run uses them or on a disk error, stay:
        # cleanup must not raise.
        with contextlib.suppress(OSError):
            if self._created_file:
                self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in reversed(self._created_directories):
                path.rmdir()

    def _held_by_another(self) -> str:
        return held_message(self.directory, _read_holder(self.path))


def _read_holder(path: Path) -> ProcessIdentity | None:
    try:
        return read_holder(path)
    except FileNotFoundError:
        return None


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _close_in_forked_children(lock: RunLock) -> None:
    """Close the lock in forked children.

    A child that outlived a killed parent would keep the run locked.
    """
    reference = weakref.ref(lock)

    def close() -> None:
        held = reference()
        if held is not None and held._descriptor is not None:
            os.close(held._descriptor)
            held._descriptor = None
            held._lease.forget()

    os.register_at_fork(after_in_child=close)
