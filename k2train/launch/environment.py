"""What the launcher says of this process, and what the process tells it at its end. The one place for those variables.

Kept apart from `grid` because a config mistake must be told, once and not once a rank, before torch is imported.
"""

import contextlib
import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from k2train.errors import RunError


@dataclass(frozen=True)
class Launch:
    """One process as torchrun started it; without torchrun it is rank 0 of a world of 1."""

    rank: int
    world_size: int
    local_rank: int
    launched: bool


def read_launch() -> Launch:
    """Read RANK, WORLD_SIZE and LOCAL_RANK.

    Raises RunError when only some of them are set: a world of one by accident trains N copies in silence. And when the
    world is not the one that a batch script asked for in K2TRAIN_WORLD_SIZE: on fewer nodes the same config trains on
    with another layout, slower, and nobody is told.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name) for name in names]
    if all(value is None for value in values):
        _check_world(1)
        return Launch(0, 1, 0, launched=False)
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise RunError(
            f"{', '.join(missing)} not set although {len(names) - len(missing)} of {', '.join(names)} are; start with torchrun or unset them all"
        )
    try:
        rank, world_size, local_rank = (int(str(value)) for value in values)
    except ValueError:
        raise RunError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be integers, got {', '.join(map(str, values))}"
        ) from None
    if not 0 <= rank < world_size:
        raise RunError(f"RANK ({rank}) must be in 0..WORLD_SIZE-1 (WORLD_SIZE is {world_size})")
    _check_world(world_size)
    return Launch(rank, world_size, local_rank, launched=True)


def _check_world(world_size: int) -> None:
    asked = os.environ.get("K2TRAIN_WORLD_SIZE", "")
    if asked and asked != str(world_size):
        raise RunError(
            f"{world_size} processes met where K2TRAIN_WORLD_SIZE asks for {asked}; "
            "start as many (nodes x processes a node), or unset it"
        )


STATUS_FOLDER = "K2TRAIN_VERDICTS"
"""Names the folder where each process of a machine leaves its note: torchrun hides exit codes when a signal ended it."""
LAUNCHER_FILE = "launcher"
"""The note of the launcher itself in that folder."""
SET_PARENT_DEATH_SIGNAL = 1
"""prctl(2): PR_SET_PDEATHSIG."""


@dataclass(frozen=True)
class ProcessStatus:
    """What one process says of itself: its exit code, or None while it runs, then with its id and when it began."""

    code: int | None
    pid: int = 0
    start_ticks: str = ""
    saving: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether that process, and not a later one of the same id, still runs."""
        return self.code is None and self.pid > 0 and start_ticks(self.pid) == self.start_ticks


def write_status(rank: int, code: int | None, saving: bool = False) -> None:
    """Tell a k2train launcher this process's exit code; None: still running. Nothing under another launcher.

    `saving`: a save is under way, so that a launcher which has to end this process gives it time.
    The first call also asks the kernel to send SIGTERM when the launcher dies: a process that nobody waits for would
    train on, and keep the run's lock.
    """
    value = os.environ.get(STATUS_FOLDER)
    if not value or not (folder := Path(value)).is_dir():
        return
    path = folder / f"rank_{rank}"
    if code is None and not path.exists():
        _die_with_launcher(folder)
    status = f"running {os.getpid()} {start_ticks(os.getpid())}{' saving' if saving else ''}"
    temporary = folder / f".rank_{rank}"
    # The launcher reads at any moment: half a note must not be seen. A full disk is no reason to end a training.
    with contextlib.suppress(OSError):
        temporary.write_text(status if code is None else str(code))
        temporary.replace(path)


def _die_with_launcher(folder: Path) -> None:
    if not sys.platform.startswith("linux") or not (folder / LAUNCHER_FILE).exists():
        return
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != int((folder / LAUNCHER_FILE).read_text()):
        # It died before the kernel was asked.
        os.kill(os.getpid(), signal.SIGTERM)


def start_ticks(pid: int) -> str:
    """When a process began, in clock ticks since boot; "" when it is gone, a zombie, or the system does not tell."""
    try:
        # The name in parentheses may hold anything; state is the first field behind it, the start time the twentieth.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def request_statuses(folder: Path) -> None:
    """Ask the processes started from here to leave their notes in `folder`."""
    (folder / LAUNCHER_FILE).write_text(str(os.getpid()))
    os.environ[STATUS_FOLDER] = str(folder)


def read_statuses(folder: Path) -> dict[int, ProcessStatus]:
    """Rank -> the note of every process that started."""
    found = {}
    for path in folder.glob("rank_*"):
        code, *more = path.read_text().split()
        rank = int(path.name.removeprefix("rank_"))
        if code == "running":
            found[rank] = ProcessStatus(
                None, int(more[0]), more[1] if len(more) > 1 else "", "saving" in more
            )
        else:
            found[rank] = ProcessStatus(int(code))
    return dict(sorted(found.items()))


def read_faults() -> str:
    """The faults that this process was asked to arm (see `k2train.fault_injection`), "" for none."""
    return os.environ.get("K2TRAIN_FAULTS", "")


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def limit_cuda_connections() -> None:
    """Ask CUDA, in the processes started from here, to begin kernels of all streams in the order they are queued.

    A layer that overlaps queues a collective first and then the product that hides it. With CUDA's usual 8 hardware
    queues, one a stream, the product may still be begun first and take all compute units, and the collective begins when
    it is over: nothing was hidden. With one queue the collective gets the few units that it needs, and the product the
    rest. A value that is set already stays: products fused over symmetric memory do better with several queues, since
    there copies wait for other devices.
    """
    os.environ.setdefault(CONNECTIONS, "1")
