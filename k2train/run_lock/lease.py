"""The lease of a run directory: `lease_000007.json` names who may write there, and 7 is its fencing token.

It decides where flock does not reach, between two hosts of a shared file system, and it tells a process that was stopped
and woken again that the run belongs to another by now (`check`). Taking it means making the file of the next number,
whole and with its content, by a hard link, which exactly one of many can do on a local disk, NFS or Lustre; the highest
number counts, it is never given out twice, and stays on the disk after the end. The holder renews a counter in its file.
A holder is pushed aside only when it is shown to be gone (see `holder`), never because time has passed.
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
from k2train.files import sync_directory
from k2train.run_lock.process_identity import (
    Holder,
    JobEnded,
    describe,
    ended_elsewhere,
    kernel_verdict,
    this_process,
)

NAME = re.compile(r"lease_(\d{6,12})\.(json|ended)")
BEAT_SECONDS = 0.5
WATCH_SECONDS = 1.6
BLOCK_BYTES = 2048


class Place(NamedTuple):
    """One lease file. `ended`: a person has declared its holder gone by giving it that name."""

    token: int
    path: Path
    ended: bool


class Lease:
    """The lease of one run directory, which must exist; `take`, `check`, `release`."""

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
        self.told = ""
        self._place: Place | None = None
        self._beat: _Beat | None = None

    def take(self) -> None:
        """Become the holder. Raises RunError within two seconds (and what `job_ended` takes), naming the holder, while another one may be alive.

        Raises FileNotFoundError when the directory went away meanwhile, other OSErrors when the disk refuses.
        """
        while True:
            before = newest(self.directory)
            why = "" if before is None else self._why_free(before)
            mine = self._create(1 if before is None else before.token + 1)
            if mine is None:
                continue
            if newest(self.directory) == mine:
                break
            # The number before ours was given out and taken away again since we looked: a higher one counts.
            self.drop()
        self.token, self.first = mine.token, before is None
        if before is not None and why:
            self.taken_over_from = {"token": before.token, "reason": why}
        self._tidy(mine)

    def check(self) -> None:
        """Raises RunError when the run is not ours any more: a later token, or our file renamed or removed."""
        assert self._place is not None and self._beat is not None, "the lease is not held"
        now = newest(self.directory)
        if now == self._place and self._beat.is_file(now.path):
            return
        if now is None or now.token <= self.token:
            what = f"{self._place.path.name} was renamed or removed by hand"
        else:
            what = f"it was taken over by {_told(read_holder(now.path))} (token {now.token})"
        raise RunError(
            f"{self.directory} is not this run's any more (token {self.token}): {what}; nothing more may be written "
            "there, so this process ends"
        )

    def release(self) -> None:
        """Say that nobody holds the run; the file stays, for the number, and names no host any more."""
        if self._beat is not None:
            self._beat.end({"token": self.token, "released": True})
        self._beat = None

    def drop(self) -> None:
        """Take the file itself away: of a lease that lost the race, or of a start that leaves nothing behind."""
        if self._beat is None or self._place is None:
            return
        mine = self._beat.is_file(self._place.path)
        self._beat.end(None)
        self._beat = None
        if mine:
            self._place.path.unlink(missing_ok=True)

    def forget(self) -> None:
        """In a forked child: the file is the parent's."""
        if self._beat is not None:
            os.close(self._beat.descriptor)
        self._beat = None

    def _why_free(self, place: Place) -> str:
        """ "" when it was released, else why its holder is gone. Raises RunError when it may be alive."""
        if place.ended:
            return "a person declared it ended"
        try:
            holder = read_holder(place.path)
        except FileNotFoundError:
            return ""
        if holder is None:
            raise RunError(
                f"{place.path} is damaged and does not say who holds the run; when no job trains there any more: "
                f"{_end_command(place)}"
            )
        if holder.get("released") is True:
            return ""
        alive = kernel_verdict(holder)
        if alive is False:
            why = "that process is gone"
        elif alive is None and not self._beats(place.path, holder):
            why = ended_elsewhere(holder, this_process(self.facts), self.job_ended)
            if not why:
                raise RunError(self._silent(place, holder))
        else:
            raise RunError(held_by(self.directory, holder))
        self.told = f"took the run over from {describe(holder)} (token {place.token}): {why}"
        return why

    def _beats(self, path: Path, holder: Holder) -> bool:
        """Whether the counter moves, or the file is released or replaced, while we watch."""
        until = self.clock() + WATCH_SECONDS
        while self.clock() < until:
            time.sleep(0.1)
            try:
                now = read_holder(path)
            except FileNotFoundError:
                return True
            if now is None or now.get("beat") != holder.get("beat"):
                return True
        return False

    def _silent(self, place: Place, holder: Holder) -> str:
        job = holder.get("slurm_job_id")
        ask = f"ask with `squeue -j {job}`" if job else f"look on {holder.get('host')}"
        return (
            f"{self.directory} is held by {describe(holder)}, which gives no sign of life, but may only be stopped; "
            f"{ask}, and when it is gone: {_end_command(place)}"
        )

    def _create(self, token: int) -> Place | None:
        """The file of `token` with its content, on the disk; None when another process has it."""
        path = self.directory / f"lease_{token:06d}.json"
        aside = self.directory / f".lease_{uuid4().hex}.tmp"
        content = {"token": token, "released": False, "beat": 0, **this_process(self.facts)}
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(descriptor, _block(content), 0)
            os.fsync(descriptor)
            os.link(aside, path)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, FileExistsError):
                return None
            raise
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()
        sync_directory(self.directory)
        self._place = Place(token, path, False)
        self._beat = _Beat(descriptor, content)
        return self._place

    def _tidy(self, mine: Place) -> None:
        for path in self.directory.iterdir():
            match = NAME.fullmatch(path.name)
            old = match is not None and int(match[1]) < mine.token
            if old or (path.name.startswith(".lease_") and path.suffix == ".tmp"):
                with contextlib.suppress(OSError):
                    path.unlink()


class _Beat:
    """The open file of a held lease, and the thread that renews its counter in place.

    In place, so that a holder that wakes up late writes into a file that lost its name, and never makes the name again.
    """

    def __init__(self, descriptor: int, content: Holder) -> None:
        self.descriptor = descriptor
        self._content = content
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    def is_file(self, path: Path) -> bool:
        """Whether the file of that name is the one that we renew."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(path))
        except FileNotFoundError:
            return False

    def end(self, last: Holder | None) -> None:
        """Stop, write `last` if there is one, and close."""
        self._ended.set()
        self._thread.join()
        if last is not None:
            with contextlib.suppress(OSError):
                self._write(last)
        os.close(self.descriptor)

    def _work(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._content["beat"] += 1
            # A beat that the disk refuses is one that others do not see: they then find no proof, and stay out.
            with contextlib.suppress(OSError):
                self._write(self._content)

    def _write(self, content: Holder) -> None:
        os.pwrite(self.descriptor, _block(content), 0)
        # NFS shows a change to others when it is synced or the file is closed.
        os.fdatasync(self.descriptor)


def newest(directory: Path) -> Place | None:
    """The lease that counts: the highest number there is."""
    found = [(match, path) for path in directory.iterdir() if (match := NAME.fullmatch(path.name))]
    places = [Place(int(match[1]), path, match[2] == "ended") for match, path in found]
    return max(places, key=lambda place: (place.token, place.ended), default=None)


def read_holder(path: Path) -> Holder | None:
    """Who is named in a lease or lock file; tried for a moment, since it may be half written just now.

    None when the file says nothing that can be understood. Raises FileNotFoundError.
    """
    for _ in range(10):
        try:
            holder = json.loads(_head(path))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RecursionError):
            time.sleep(0.03)
            continue
        return holder if isinstance(holder, dict) and _is_whole(holder) else None
    return None


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(BLOCK_BYTES)


def held_by(directory: Path, holder: Holder | None) -> str:
    """One line for who comes second."""
    if holder is None:
        return f"{directory} is held by a live run that has not said who it is; wait, or choose another run.name"
    return (
        f"{directory} is held by a live run: {describe(holder)}; stop it with `kill -TERM {holder.get('pid')}` there "
        "(it saves first), or choose another run.name or run.directory"
    )


def _is_whole(holder: Holder) -> bool:
    return holder.get("released") is True or isinstance(holder.get("pid"), int)


def _told(holder: Holder | None) -> str:
    if holder is None or holder.get("released"):
        return "a later run"
    return describe(holder)


def _end_command(place: Place) -> str:
    return f"`mv {place.path} {place.path.with_suffix('.ended')}`, then start again"


def _block(content: Holder) -> bytes:
    """JSON padded to one block: renewed in one write, it is never shorter or longer than before."""
    text = json.dumps(content).encode()
    assert len(text) < BLOCK_BYTES, f"{len(text)} bytes about a holder"
    return text.ljust(BLOCK_BYTES - 1) + b"\n"
