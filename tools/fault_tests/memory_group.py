"""Memory limit by cgroup (v1 or v2): a group of processes, and a hog that fills it up on command.

    python tools/fault_tests/memory_group.py GROUP        the hog: fills GROUP when a line comes

- The chosen process has the highest oom_score_adj (1000), so the kernel kills that one as soon as
  the limit is met. The hog stops at the first kill and frees what it had.
- Group and hog are gone when the context ends, whatever happened.

Alternatives considered:
- `ulimit -v` and RLIMIT_AS: they make an allocation fail, which a program can report; the kernel
  kills without a word.
- A hog that cannot be killed (oom_score_adj -1000): lowering it takes CAP_SYS_RESOURCE, which root
  in a container often lacks.
"""

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ROOM_BYTES = 16 << 20
"""How much the group may use more than it does when the limit is set."""
PIECE_BYTES = 256 << 10
GONE_SECONDS = 10.0
VICTIM = 1000
"""oom_score_adj of the process that the kernel shall choose: more than any memory counts."""


@dataclass(frozen=True)
class Interface:
    """Where memory groups can be made, and the names of their files."""

    parent: Path
    limit: str
    usage: str
    events: str


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control")
V2 = ("memory.max", "memory.current", "memory.events")


def find_interface(mounts: str, own: str) -> Interface | None:
    """The memory controller, from the texts of /proc/mounts and /proc/self/cgroup."""
    for line in mounts.splitlines():
        fields = line.split()
        place, kind, options = Path(fields[1]), fields[2], fields[3].split(",")
        if kind == "cgroup" and "memory" in options:
            return Interface(_own_folder(place, own, "memory"), *V1)
        if kind == "cgroup2" and "memory" in _words(place / "cgroup.controllers"):
            return Interface(place, *V2)
    return None


def _own_folder(place: Path, own: str, controller: str) -> Path:
    """This process' group of a v1 controller, where it is visible; else the mount itself."""
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") and (place / path.lstrip("/")).is_dir():
            return place / path.lstrip("/")
    return place


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


class MemoryGroup:
    """Context manager: a memory group and its hog, or the reason in `problem` why not."""

    def __init__(self, name: str):
        self.name = name
        self.problem = ""
        self.hog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        found = find_interface(
            Path("/proc/mounts").read_text(), Path("/proc/self/cgroup").read_text()
        )
        if os.geteuid() != 0:
            self.problem = "a memory group needs root"
        elif found is None:
            self.problem = "no memory controller is mounted"
        else:
            self.interface, self.folder = found, found.parent / self.name
            try:
                self._make()
            except OSError as error:
                self.problem = f"{self.folder}: {error.strerror}"
        return self

    def _make(self) -> None:
        control = self.interface.parent / "cgroup.subtree_control"
        if control.exists() and "memory" not in _words(control):
            control.write_text("+memory")
        self.folder.mkdir()

    def __exit__(self, *_: object) -> None:
        if self.problem:
            return
        self.end_hog()
        deadline = time.monotonic() + GONE_SECONDS
        while time.monotonic() < deadline:
            for pid in _words(self.folder / "cgroup.procs"):
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            # A group whose last process has just ended is busy for a moment.
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.02)

    @property
    def kills(self) -> int:
        """How many processes of the group the kernel has killed."""
        return oom_kills(self.folder / self.interface.events)

    def add(self, pids: Iterable[int], victim: int) -> None:
        """Move processes into the group and mark the one of them that the kernel shall choose."""
        for pid in pids:
            (self.folder / "cgroup.procs").write_text(str(pid))
        Path(f"/proc/{victim}/oom_score_adj").write_text(str(VICTIM))

    def start_hog(self) -> None:
        """Start the hog in the group; it waits for `fill`."""
        self.hog = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).resolve()),
                str(self.folder / self.interface.events),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        (self.folder / "cgroup.procs").write_text(str(self.hog.pid))
        assert self.hog.stdout is not None, "a pipe was asked for"
        self.hog.stdout.readline()

    def fill(self, room: int = ROOM_BYTES) -> None:
        """Set the limit, and let the hog fill the group.

        Not before: what the ranks allocate by themselves must not meet the limit.
        """
        usage = int((self.folder / self.interface.usage).read_text())
        (self.folder / self.interface.limit).write_text(str(usage + room))
        assert self.hog is not None and self.hog.stdin is not None, "start_hog comes first"
        self.hog.stdin.write(b"\n")
        self.hog.stdin.flush()

    def end_hog(self) -> None:
        """Kill the hog, and lift the limit for those who are left."""
        with suppress(OSError):
            (self.folder / self.interface.limit).write_text(
                "max" if self.interface.limit == V2[0] else "-1"
            )
        if self.hog is not None:
            self.hog.kill()
            self.hog.communicate()
            self.hog = None


def oom_kills(path: Path) -> int:
    """Read the count of `oom_kill`."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return next((int(fields[1]) for fields in lines if fields[0] == "oom_kill"), 0)


def hog(events: Path) -> None:
    """Wait for a line, then take memory until the kernel has killed a process of the group."""
    before, taken = oom_kills(events), list[mmap.mmap]()
    print("ready", flush=True)
    if not sys.stdin.readline():
        return

    while oom_kills(events) == before:
        piece = mmap.mmap(-1, PIECE_BYTES)
        # Touched, so that the pages are there and charged.
        piece.write(b"\x01" * PIECE_BYTES)
        taken.append(piece)


if __name__ == "__main__":
    hog(Path(sys.argv[1]))
