"""Status files: each process of a machine tells its launcher that it runs, saves or has ended.

- torchrun hides the exit codes of its processes when a signal ended it.
- Both ends keep the files open. Temporary folders are cleaned by others, in mid-run too: a file
  without a name still carries what is written to it.
- A record has a fixed length and a checksum, since it is read while it is written.
- The launcher holds a lock on the folder, which systemd's cleaner respects.
- A process that ends writes when: who ended first is the cause, the others followed (`first_end`).
- Beside them the launcher notes the signals that it got: a process can tell a request to stop from
  the end of another one.

Alternatives considered:
- A pipe from each process: torchrun starts the processes, and hands nothing on.
- /dev/shm: systemd empties it when the user logs out.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from k2train.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USAGE
from k2train.processes import start_ticks

LAUNCHER_FILE = "launcher"
"""File in the folder of the status files with the launcher's process id."""
SIGNALS_FILE = "signals"
"""File beside it with the names of the signals that the launcher got, if any."""
RECORD_BYTES = 96
"""Length of a record, filled with blanks."""
REASON_LIMIT = 40
"""Longest reason in a record, in characters."""
SET_PARENT_DEATH_SIGNAL = 1
"""prctl(2): PR_SET_PDEATHSIG."""


@dataclass(frozen=True)
class ProcessStatus:
    """Status of one process: its exit code, or while it runs None, its id and its start time.

    `ended_at` is when it wrote its exit code, by the machine's monotonic clock in seconds; 0 if it
    did not say. `reason` is the signal by which it was asked to stop, if any.
    """

    code: int | None
    pid: int = 0
    start_ticks: int = 0
    saving: bool = False
    ended_at: float = 0.0
    reason: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether that process still runs, and not a later one with the same id."""
        return self.code is None and self.pid > 0 and start_ticks(self.pid) == self.start_ticks

    def record(self) -> bytes:
        """Return it as the bytes of a status file."""
        if self.code is None:
            text = f"running {self.pid} {self.start_ticks}" + (" saving" if self.saving else "")
        else:
            reason = self.reason.encode("ascii", "replace").decode()[:REASON_LIMIT]
            text = f"{self.code} {self.ended_at:.6f} {reason}".rstrip()
        return f"{zlib.crc32(text.encode()):08x} {text}".ljust(RECORD_BYTES - 1).encode() + b"\n"

    @classmethod
    def of(cls, record: bytes) -> "ProcessStatus | None":
        """Read a record; None for one that is half written."""
        check, _, text = record.decode("ascii", "replace").strip().partition(" ")
        if check != f"{zlib.crc32(text.encode()):08x}":
            return None
        words = text.split()
        if words[0] != "running":
            ended_at = float(words[1]) if len(words) > 1 else 0.0
            return cls(int(words[0]), ended_at=ended_at, reason=" ".join(words[2:]))
        return cls(None, int(words[1]), int(words[2]), "saving" in words)


def has_failed(status: ProcessStatus) -> bool:
    """Return whether a process has ended in a way that ends the job.

    Done, stopped after saving, and a rejected config do not.
    """
    if status.code is None:
        return not status.is_alive
    return status.code not in (EXIT_DONE, EXIT_STOPPED, EXIT_USAGE)


@dataclass(frozen=True)
class End:
    """How a process ended: its own exit code, None if it wrote none, and when (monotonic s)."""

    code: int | None
    at: float


def first_end(ends: Iterable[End]) -> End | None:
    """Return the first end of a job that was neither done nor stopped after saving; None for none.

    It is the cause. What other processes do afterwards, ended by a launcher or without a peer,
    says nothing of the job.
    """
    ended = [one for one in ends if one.code not in (EXIT_DONE, EXIT_STOPPED)]
    return min(ended, key=lambda one: one.at, default=None)


def write_signals(folder: Path, names: Iterable[str]) -> None:
    """Note the signals that the launcher got, before it hands them on."""
    # A full disk must not keep a signal back.
    with contextlib.suppress(OSError):
        (folder / SIGNALS_FILE).write_text(" ".join(names))


def read_signals(folder: Path) -> frozenset[str]:
    """Return the names of the signals that the launcher got."""
    with contextlib.suppress(OSError):
        return frozenset((folder / SIGNALS_FILE).read_text().split())
    return frozenset()


_own: dict[tuple[str, int], int] = {}
"""Open status files of this process, by path and process id: a forked process has its own."""


def write_file(
    folder: Path, rank: int, code: int | None, saving: bool = False, reason: str = ""
) -> None:
    """Write this process's status file in `folder`; see `environment.write_status`."""
    pid = os.getpid()
    ended_at = 0.0 if code is None else time.monotonic()
    status = ProcessStatus(code, pid, start_ticks(pid), saving, ended_at, reason)
    path = folder / f"rank_{rank}"
    descriptor = _own.get((str(path), pid))

    # A full disk must not end a run.
    with contextlib.suppress(OSError):
        if descriptor is not None:
            os.pwrite(descriptor, status.record(), 0)
        elif folder.is_dir():
            if code is None:
                _die_with_launcher(folder)
            _own[str(path), pid] = _create(path, status.record())


def _create(path: Path, record: bytes) -> int:
    # Renamed into place: a file of that name may be of a process that is gone.
    temporary = path.with_name(f".{path.name}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, record, 0)
        temporary.replace(path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _die_with_launcher(folder: Path) -> None:
    if not sys.platform.startswith("linux") or not (folder / LAUNCHER_FILE).exists():
        return
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != int((folder / LAUNCHER_FILE).read_text()):
        # The launcher died before the request to the kernel.
        os.kill(os.getpid(), signal.SIGTERM)


class StatusBoard:
    """The status files in `folder`, kept open from the first look at each until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[int, int] = {}
        self._last: dict[int, ProcessStatus] = {}
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            fcntl.flock(self._folder, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        for descriptor in (self._folder, *self._files.values()):
            os.close(descriptor)
        self._files = {}

    def read(self) -> dict[int, ProcessStatus]:
        """Return rank -> status of every process that started."""
        for path in self.folder.glob("rank_*"):
            with contextlib.suppress(OSError):
                self._open(path)

        for rank, descriptor in self._files.items():
            status = ProcessStatus.of(os.pread(descriptor, RECORD_BYTES, 0))
            if status is not None:
                self._last[rank] = status
        return dict(sorted(self._last.items()))

    def _open(self, path: Path) -> None:
        rank = int(path.name.removeprefix("rank_"))
        known = self._files.get(rank)
        if known is not None and os.path.samestat(os.fstat(known), path.stat()):
            return
        # The first process of this rank, or a later one.
        self._files[rank] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if known is not None:
            os.close(known)


def read_statuses(folder: Path) -> dict[int, ProcessStatus]:
    """Return rank -> status of every process that started, by one look."""
    with StatusBoard(folder) as board:
        return board.read()
