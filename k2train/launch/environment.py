"""Launch environment: variables from torchrun, and those that a launcher hands to its processes.

- The only module that reads or writes these environment variables.
- Separate from `parallel.grid`, because a config mistake must be reported once, not once per rank,
  and before torch is imported.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from k2train.errors import RunError
from k2train.launch.status import LAUNCHER_FILE, write_file


@dataclass(frozen=True)
class Launch:
    """Rank, world size and local rank of this process; without torchrun rank 0 of 1."""

    rank: int
    world_size: int
    local_rank: int
    launched: bool


def read_launch() -> Launch:
    """Read RANK, WORLD_SIZE and LOCAL_RANK.

    Raises RunError when only some of them are set: an accidental world of one would silently train
    N copies. Raises RunError also when the world size is not the K2TRAIN_WORLD_SIZE of a batch
    script: on fewer nodes the same config would train with another layout, slower and unnoticed.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name) for name in names]
    if all(value is None for value in values):
        _check_world(1)
        return Launch(0, 1, 0, launched=False)

    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise RunError(
            f"{', '.join(missing)} not set although {len(names) - len(missing)} of "
            f"{', '.join(names)} are; start with torchrun or unset them all"
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
"""Variable with the folder in which each process of a machine writes its status file."""


def write_status(rank: int, code: int | None, saving: bool = False) -> None:
    """Write this process's exit code for the k2train launcher; None: still running.

    Does nothing under another launcher. `saving`: a save is running, so a launcher that has to end
    this process gives it time. The first call also asks the kernel to send SIGTERM when the
    launcher dies: an orphaned process would train on and keep the run's lock.
    The signal may come several times: the threads of the launcher end one after the other, and
    each hands its children to the next.
    """
    if folder := os.environ.get(STATUS_FOLDER):
        write_file(Path(folder), rank, code, saving)


def request_statuses(folder: Path) -> None:
    """Ask the processes started from here to write their status files in `folder`."""
    (folder / LAUNCHER_FILE).write_text(str(os.getpid()))
    os.environ[STATUS_FOLDER] = str(folder)


def store_file(world_size: int) -> Path | None:
    """Return the file in which the processes of a job find each other.

    None where they are on several machines, or were started by another launcher.
    """
    folder, alike = os.environ.get(STATUS_FOLDER), os.environ.get("LOCAL_WORLD_SIZE")
    if not folder or alike != str(world_size) or not (Path(folder) / LAUNCHER_FILE).exists():
        return None
    # torchrun's own restarts use the same folder again.
    return Path(folder) / f"store_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def open_port(world_size: int) -> str:
    """Return the address of the port at which the processes of a job meet; "" for none."""
    if world_size == 1 or store_file(world_size) is not None:
        return ""
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"


def keep_sockets_inside() -> None:
    """Let the processes started from here talk over loopback only, unless the user said where.

    torchrun opens no store for them beside that of the rendezvous.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if sys.platform.startswith("linux"):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def read_faults() -> str:
    """Return the faults for this process to arm (see `k2train.fault_injection`), "" if none."""
    return os.environ.get("K2TRAIN_FAULTS", "")


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def limit_cuda_connections() -> None:
    """Give the processes started from here one CUDA hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1).

    - A layer with overlap queues a collective first, then the product that hides it.
    - With CUDA's usual 8 queues, one per stream, the product may still start first and take all
      compute units. The collective then starts when the product is over, and nothing is hidden.
    - With one queue kernels of all streams start in the order they are queued. The collective gets
      the few units that it needs, and the product the rest.
    - A value that is already set stays: products fused over symmetric memory do better with several
      queues, since there copies wait for other devices.
    """
    os.environ.setdefault(CONNECTIONS, "1")
