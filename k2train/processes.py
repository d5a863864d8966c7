"""Process identity, liveness, descendants and memory, from /proc; standard library only.

- A process is identified by its boot, process id namespace, id and start time in ticks since boot.
  Neither a reboot nor a reused id can be mistaken for it.
- A zombie counts as gone: it no longer runs and only waits to be reaped.
- Of a process in another boot or namespace nothing is known here.

Alternatives considered:
- psutil: it derives the start time from the wall clock, which may jump during a run.
"""

import os
import resource
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ProcessState = Literal["running", "stopped", "traced", "gone", ""]
HALTED: dict[str, ProcessState] = {"T": "stopped", "t": "traced"}
"""States of a process that was stopped by a signal, or by a debugger or profiler."""
GONE = ("Z", "X", "x")
"""States in /proc/PID/stat of a process that no longer runs."""


@dataclass(frozen=True)
class Process:
    """Identity of one process, safe against reused process ids on this machine or another."""

    pid: int
    start_ticks: int
    """Start time in kernel ticks since boot. A later process with the same id has another one."""
    boot_id: str
    pid_namespace: str
    """Containers on one machine share the boot_id but number processes differently."""
    host: str


def this_process() -> Process:
    """Identity of the calling process; "" and 0 for what this system does not provide."""
    pid = os.getpid()
    return Process(pid, start_ticks(pid), boot_id(), pid_namespace(), socket.gethostname())


def file_system_view() -> str:
    """What this process sees of the file systems: equal for all in one container or machine.

    "" where this system does not say.
    """
    try:
        return f"{boot_id()} {os.readlink('/proc/self/ns/mnt')}" if boot_id() else ""
    except OSError:
        return ""


def process_state(process: Process, reader: Process) -> ProcessState:
    """State of `process` as visible to `reader`, the calling process; "" on another machine."""
    if not process.boot_id or (process.boot_id, process.pid_namespace) != (
        reader.boot_id,
        reader.pid_namespace,
    ):
        return ""
    stat = read_stat(process.pid)
    if stat is None or stat.state in GONE or stat.start_ticks != process.start_ticks:
        return "gone"
    return HALTED.get(stat.state, "running")


class ProcessStat(NamedTuple):
    """The fields of /proc/PID/stat that are used here."""

    name: str
    state: str
    parent: int
    group: int
    start_ticks: int


def read_stat(pid: int) -> ProcessStat | None:
    """Read /proc/PID/stat; None when there is no such process. Raises OSError when hidden."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may contain spaces and parentheses.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    name = head.partition("(")[2]
    return ProcessStat(name, fields[0], int(fields[1]), int(fields[2]), int(fields[19]))


def start_ticks(pid: int) -> int:
    """Start time in ticks since boot; 0 when the process is gone, or without /proc."""
    stat = read_stat(pid)
    return 0 if stat is None or stat.state in GONE else stat.start_ticks


def exists(pid: int) -> bool:
    """Whether a process of this machine has this number; one of another user counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def live_processes() -> dict[int, ProcessStat]:
    """All processes that still run, by id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            stat = read_stat(int(entry.name))
            if stat is not None and stat.state not in GONE:
                found[int(entry.name)] = stat
    return found


def descendants(roots: Iterable[int]) -> list[int]:
    """Live processes below these, parents before their children."""
    children: dict[int, list[int]] = {}
    for pid, stat in live_processes().items():
        children.setdefault(stat.parent, []).append(pid)

    found = list(roots)
    first = len(found)
    for parent in found:
        found += children.get(parent, [])
    return found[first:]


def boot_id() -> str:
    """Id that differs between boots and between machines; "" where the kernel provides none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Name of the calling process's process id namespace; "" where the kernel provides none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def peak_resident_bytes() -> int:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its figure for a child starts at that of its parent.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
