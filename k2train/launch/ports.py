"""Listening ports of this machine: who holds the port at which the launchers of several nodes meet.

- A port that another program holds makes torchrun wait for a minute and end with two backtraces.
- A launcher of the same user may hold it rightly: several of them on one machine share a store.
- What /proc does not show is taken as free, also a socket whose owner is hidden: in another
  container on the same network it may be a launcher.

Alternatives considered:
- Asking the listener whether it is a store: torch's client waits for ever for one that is silent.
"""

import os
from contextlib import suppress
from pathlib import Path

LISTENING = "0A"
LAUNCHERS = (
    "k2train.launch",
    "k2train launch",
    "torch.distributed.run",
    "torch.distributed.launch",
    "torchrun",
)
"""Words in the command line of a program that makes or joins a store."""


def taken_by(port: int, own_pid: int, proc: Path = Path("/proc")) -> str:
    """Describe the program that listens at a port of this machine; "" for none, or a launcher."""
    sockets = _listening(port, proc)
    for pid, line in _owners(sockets, proc) if sockets else []:
        if pid == own_pid or any(word in line for word in LAUNCHERS):
            return ""
        return f"pid {pid} ({line[:60]})"
    return ""


def _listening(port: int, proc: Path) -> set[str]:
    """Inodes of the sockets that listen at a port."""
    found = set()
    for table in ("net/tcp", "net/tcp6"):
        with suppress(OSError):
            for line in (proc / table).read_text("ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
    return found


def _owners(sockets: set[str], proc: Path) -> list[tuple[int, str]]:
    """Process id and command line of whoever holds one of the sockets, as far as it shows."""
    found = []
    for folder in map(proc.joinpath, os.listdir(proc)):
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            if any(
                os.readlink(link) in sockets
                for link in map((folder / "fd").joinpath, os.listdir(folder / "fd"))
            ):
                line = (
                    (folder / "cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode("utf-8", "replace")
                )
                found.append((int(folder.name), " ".join(line.split())))
    return found
