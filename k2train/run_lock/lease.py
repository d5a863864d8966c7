"""Lease of a run directory: `lease_000007.json` names its holder, and 7 is its fencing token.

- It decides where flock does not reach: between two hosts of a shared file system. By
  `check`, a process that was stopped and resumed learns that the run has another owner by now.
- Taking it creates the file of the next number, complete with its content, by a hard link. Exactly
  one of many processes can do so on a local disk, NFS or Lustre. A file system without links
  creates it by name (`files.create_once`): a reader that finds it short waits a moment.
- The highest number counts. It is never reused, and stays on the disk after the end.
- The holder renews a counter in its file.
- A holder is replaced only when it is shown to be gone (see `process_identity`), never because time
  has passed.
"""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from k2train.errors import RunError
from k2train.files import create_once, sync_directory
from k2train.retry import is_passing
from k2train.run_lock.process_identity import (
    JobEnded,
    ProcessIdentity,
    describe,
    is_alive,
    own_identity,
    proof_of_end,
)

NAME = re.compile(r"lease_(\d{6,12})\.(json|ended)")
RENEW_SECONDS = 0.5
RENEWAL_WAIT_SECONDS = 1.6
BLOCK_BYTES = 2048
READS, READS_OF_EMPTY, READ_PAUSE_SECONDS = 10, 50, 0.03
"""How often a half-written file is read again. Without hard links one may be empty for a moment."""


class LeaseFile(NamedTuple):
    """One lease file. `ended`: a person declared its holder gone by renaming it."""

    token: int
    path: Path
    ended: bool


class Lease:
    """Lease of one run directory, which must exist; `take`, `check`, `release`."""

    def __init__(
        self,
        directory: Path,
        facts: Mapping[str, object],
        job_ended: JobEnded | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.facts, self.job_ended, self.clock = dict(facts), job_ended, clock
        self.token = 0
        self.first = False
        """Whether there was no lease before this one."""
        self.taken_over_from: dict[str, Any] | None = None
        self.takeover_message = ""
        self._lease_file: LeaseFile | None = None
        self._renewal: _Renewal | None = None

    def take(self) -> None:
        """Become the holder.

        Raises RunError within two seconds (plus the time of `job_ended`), naming the holder, while
        another holder may be alive. Raises FileNotFoundError when the directory disappears, and
        other OSErrors on disk errors.
        """
        while True:
            previous = newest_lease(self.directory)
            reason = "" if previous is None else self._free_reason(previous)
            own_file = self._create(1 if previous is None else previous.token + 1)
            if own_file is None:
                continue
            if newest_lease(self.directory) == own_file:
                break

            # A lower number was created and removed since the last listing; a higher one counts.
            self.drop()

        self.token, self.first = own_file.token, previous is None
        if previous is not None and reason:
            self.taken_over_from = {"token": previous.token, "reason": reason}

        self._remove_old_files(own_file)

    def check(self) -> None:
        """Raise RunError when the run has another owner.

        That is a later token, or our file renamed or removed.
        """
        assert self._lease_file is not None and self._renewal is not None, "the lease is not held"
        current = newest_lease(self.directory)
        if current == self._lease_file and self._renewal.is_file(current.path):
            return

        if current is None or current.token <= self.token:
            what = f"{self._lease_file.path.name} was renamed or removed by hand"
        else:
            what = (
                f"it was taken over by {_describe_owner(read_holder(current.path))} (token "
                f"{current.token})"
            )

        raise RunError(
            f"{self.directory} no longer belongs to this run (token {self.token}): {what}; this "
            "process may not write there any more, so it ends"
        )

    def release(self) -> None:
        """Mark the run as released. The file keeps its number but no longer names a host."""
        if self._renewal is not None:
            self._renewal.end({"token": self.token, "released": True})
        self._renewal = None

    def drop(self) -> None:
        """Remove the lease file of a lost race, or of a start that leaves nothing behind."""
        if self._renewal is None or self._lease_file is None:
            return
        own_file = self._renewal.is_file(self._lease_file.path)
        self._renewal.end(None)
        self._renewal = None
        if own_file:
            self._lease_file.path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Close the file in a forked child: it belongs to the parent."""
        if self._renewal is not None:
            os.close(self._renewal.descriptor)
        self._renewal = None

    def _free_reason(self, lease_file: LeaseFile) -> str:
        """Why the holder is gone, "" when it released the lease.

        Raises RunError when it may be alive.
        """
        if lease_file.ended:
            return "a person declared it ended"

        try:
            holder = read_holder(lease_file.path)
        except FileNotFoundError:
            return ""

        if holder is None:
            raise RunError(
                f"{lease_file.path} is damaged and does not name the holder; once no job trains "
                f"there: {_end_command(lease_file)}"
            )

        if holder.get("released") is True:
            return ""

        alive = is_alive(holder)
        if alive is False:
            reason = "that process is gone"
        elif alive is None and not self._is_renewed(lease_file.path, holder):
            reason = proof_of_end(holder, own_identity(self.facts), self.job_ended)
            if not reason:
                raise RunError(self._unresponsive_message(lease_file, holder))
        else:
            raise RunError(held_message(self.directory, holder))

        self.takeover_message = (
            f"took the run over from {describe(holder)} (token {lease_file.token}): {reason}"
        )
        return reason

    def _is_renewed(self, path: Path, holder: ProcessIdentity) -> bool:
        """Whether the holder shows activity within the waiting time.

        Its counter changes, or the file is released or replaced.
        """
        until = self.clock() + RENEWAL_WAIT_SECONDS
        while self.clock() < until:
            time.sleep(0.1)
            try:
                current = read_holder(path)
            except FileNotFoundError:
                return True
            if current is None or current.get("beat") != holder.get("beat"):
                return True

        return False

    def _unresponsive_message(self, lease_file: LeaseFile, holder: ProcessIdentity) -> str:
        job = holder.get("slurm_job_id")
        ask = f"ask with `squeue -j {job}`" if job else f"look on {holder.get('host')}"
        return (
            f"{self.directory} is held by {describe(holder)}, which gives no sign of life but may "
            f"only be suspended; {ask}, and when it is gone: {_end_command(lease_file)}"
        )

    def _create(self, token: int) -> LeaseFile | None:
        """Create the file of `token` durably with its content; None when another process has it."""
        path = self.directory / f"lease_{token:06d}.json"
        content = {"token": token, "released": False, "beat": 0, **own_identity(self.facts)}
        temporary = self.directory / f".lease_{uuid4().hex}.tmp"
        descriptor = create_once(path, _block(content), temporary)
        if descriptor is None:
            return None

        sync_directory(self.directory)
        self._lease_file = LeaseFile(token, path, False)
        self._renewal = _Renewal(descriptor, content)
        return self._lease_file

    def _remove_old_files(self, own_file: LeaseFile) -> None:
        for path in self.directory.iterdir():
            match = NAME.fullmatch(path.name)
            # Lower numbers no longer count; temporary files are left by killed starts.
            old = match is not None and int(match[1]) < own_file.token
            if old or (path.name.startswith(".lease_") and path.suffix == ".tmp"):
                with contextlib.suppress(OSError):
                    path.unlink()


class _Renewal:
    """Open file of a held lease, and the thread that renews its counter in place.

    In place: a holder that resumes late writes to a file that has lost its name, and never
    recreates the name.
    """

    def __init__(self, descriptor: int, content: ProcessIdentity) -> None:
        self.descriptor = descriptor
        self._content = content
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    def is_file(self, path: Path) -> bool:
        """Whether the file of that name is the one being renewed."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(path))
        except FileNotFoundError:
            return False

    def end(self, last: ProcessIdentity | None) -> None:
        """Stop, write `last` if given, and close."""
        self._ended.set()
        self._thread.join()
        if last is not None:
            with contextlib.suppress(OSError):
                self._write(last)
        os.close(self.descriptor)

    def _work(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            self._content["beat"] += 1
            # A failed renewal is invisible to others. They then find no proof that we are gone and
            # stay out.
            with contextlib.suppress(OSError):
                self._write(self._content)

    def _write(self, content: ProcessIdentity) -> None:
        os.pwrite(self.descriptor, _block(content), 0)
        # NFS publishes a change when it is synced or the file is closed.
        os.fdatasync(self.descriptor)


def newest_lease(directory: Path) -> LeaseFile | None:
    """The lease that counts: the one with the highest number."""
    found = [(match, path) for path in directory.iterdir() if (match := NAME.fullmatch(path.name))]
    lease_files = [LeaseFile(int(match[1]), path, match[2] == "ended") for match, path in found]
    return max(
        lease_files, key=lambda lease_file: (lease_file.token, lease_file.ended), default=None
    )


def read_holder(path: Path) -> ProcessIdentity | None:
    """Read the holder named in a lease or lock file, retrying a half-written one for a moment.

    None when the content is not valid. Raises FileNotFoundError, and an OSError that may pass.
    """
    unread: OSError | None = None
    content = b""
    for attempt in range(READS_OF_EMPTY):
        if attempt >= READS and content:
            break
        try:
            content = _first_block(path)
            holder = json.loads(content)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            unread = error if isinstance(error, OSError) and is_passing(error) else None
            time.sleep(READ_PAUSE_SECONDS)
            continue
        return holder if isinstance(holder, dict) and _is_whole(holder) else None

    if unread is not None:
        raise unread
    return None


def _first_block(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(BLOCK_BYTES)


def held_message(directory: Path, holder: ProcessIdentity | None) -> str:
    """Error message for a second job that tries to use this run directory."""
    if holder is None:
        return (
            f"{directory} is held by a live run of unknown identity; wait, or choose another "
            "run.name"
        )

    return (
        f"{directory} is held by a live run: {describe(holder)}; stop it with `kill -TERM "
        f"{holder.get('pid')}` there (it saves first), or choose another run.name or run.directory"
    )


def _is_whole(holder: ProcessIdentity) -> bool:
    return holder.get("released") is True or isinstance(holder.get("pid"), int)


def _describe_owner(holder: ProcessIdentity | None) -> str:
    if holder is None or holder.get("released"):
        return "a later run"
    return describe(holder)


def _end_command(lease_file: LeaseFile) -> str:
    return f"`mv {lease_file.path} {lease_file.path.with_suffix('.ended')}`, then start again"


def _block(content: ProcessIdentity) -> bytes:
    """JSON padded to one block. Renewed in one write, it never changes its length."""
    text = json.dumps(content).encode()
    assert len(text) < BLOCK_BYTES, f"{len(text)} bytes about a holder"
    return text.ljust(BLOCK_BYTES - 1) + b"\n"
