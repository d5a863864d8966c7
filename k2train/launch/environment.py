"""Launch environment: variables from torchrun, and those that a launcher hands to its processes.

- The only module that reads or writes these environment variables.
- Separate from `parallel.grid`, because a config mistake must be reported once, not once per rank,
  and before torch is imported.
- What ended a start, a request or the failure of another process, is decided from them and from
  what the launcher notes (`was_asked_to_stop`).
- A start that srun or mpirun repeats for every task is refused: each task would train alone.

Alternatives considered:
- Taking SLURM's tasks as ranks: the store would need an address and a port that nobody else uses,
  and no launcher would hand on signals and exit codes.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from k2train.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USAGE, RunError
from k2train.launch.status import (
    LAUNCHER_FILE,
    End,
    ProcessStatus,
    first_end,
    has_failed,
    read_signals,
    read_statuses,
    write_file,
)


@dataclass(frozen=True)
class Launch:
    """Rank, world size and local rank of this process; without torchrun rank 0 of 1."""

    rank: int
    world_size: int
    local_rank: int
    launched: bool


class _TaskVariables(NamedTuple):
    """How a program that starts tasks tells each of them its number, and how many there are."""

    program: str
    number_variable: str
    count_variable: str
    """"" where only the number is told."""


_TASKS = (
    # Not SLURM_NTASKS: a batch script and a shell of salloc have it, too, and are one task.
    _TaskVariables("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    _TaskVariables("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    _TaskVariables("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    _TaskVariables("mpiexec (PMI)", "PMI_RANK", "PMI_SIZE"),
    _TaskVariables("mpiexec (PMIx)", "PMIX_RANK", ""),
)


def refuse_repeated_start(launcher: bool = False) -> None:
    """Raise RunError where this process is one of several tasks, each of which would train alone.

    K2TRAIN_WORLD_SIZE says how many processes shall meet, so with it the tasks are runs of their
    own. `launcher`: this process is a launcher, and meets nobody.
    """
    if os.environ.get("K2TRAIN_WORLD_SIZE"):
        return
    for program, number, count in _TASKS:
        task, tasks = _count(number), _count(count)
        # A number above 0 alone proves that there are others.
        if task is None or not ((tasks is None and task > 0) or (tasks or 0) > 1):
            continue
        of = f"task {task}" + ("" if tasks is None else f" of {tasks}")
        what = (
            "meets no other launcher"
            if launcher
            else "has no RANK, WORLD_SIZE and LOCAL_RANK of torchrun"
        )
        raise RunError(
            f"this is {of} that {program} started ({number}={task}), and it {what}: each task "
            "would train alone; start one launcher a node, as scripts/pretrain.sbatch does "
            "(k2train init writes it): `srun --ntasks-per-node=1 python -m k2train.launch "
            "--nnodes N --nproc-per-node M --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
            "-m k2train.train CONFIG.yaml`; if each "
            "task is a run of its own, set K2TRAIN_WORLD_SIZE" + ("" if launcher else "=1")
        )


def _count(name: str) -> int | None:
    """Return a variable that is a whole number; None for any other."""
    text = os.environ.get(name, "") if name else ""
    return int(text) if text.isascii() and text.isdigit() else None


def read_launch() -> Launch:
    """Read RANK, WORLD_SIZE and LOCAL_RANK.

    Raises RunError when only some of them are set, or when srun or mpirun started several tasks
    without them: an accidental world of one would silently train N copies. Raises RunError also
    when several processes have no address to meet at, or when the world size is not the
    K2TRAIN_WORLD_SIZE of a batch script: on fewer nodes the same config would train with another
    layout, slower and unnoticed.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name) for name in names]
    if all(value is None for value in values):
        refuse_repeated_start()
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
    if local_rank < 0:
        raise RunError(f"LOCAL_RANK ({local_rank}) must be at least 0")
    _check_world(world_size)
    if world_size > 1 and store_file(world_size) is None:
        _check_meeting_place()
    return Launch(rank, world_size, local_rank, launched=True)


RANKS_PER_DEVICE = "K2TRAIN_RANKS_PER_DEVICE"
"""Variable with how many local ranks share each CUDA device; without it each has one of its own."""


def read_ranks_per_device() -> int:
    """Read K2TRAIN_RANKS_PER_DEVICE; 1 without it.

    With more, the exchanges of a run go through host memory: NCCL takes one rank a device. For
    checking layouts on a machine with one device, not for speed. Raises RunError.
    """
    text = os.environ.get(RANKS_PER_DEVICE, "")
    if not text:
        return 1
    count = _count(RANKS_PER_DEVICE)
    if not count:
        raise RunError(
            f"{RANKS_PER_DEVICE} must be a whole number of at least 1, got {text!r}; unset it to "
            "give each rank a device of its own"
        )
    return count


def ranks_of_machine(launch: Launch) -> range:
    """Return the ranks on this machine, by LOCAL_WORLD_SIZE; without it this rank alone."""
    first, count = launch.rank - launch.local_rank, _count("LOCAL_WORLD_SIZE")
    if count is None or not launch.local_rank < count or first < 0:
        return range(launch.rank, launch.rank + 1)
    return range(first, min(first + count, launch.world_size))


def cores_of_process() -> int:
    """Return the cores for one process: those it may run on, shared with others of its machine.

    By LOCAL_WORLD_SIZE. Processes that are bound to cores of their own get less than they have.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // max(1, _count("LOCAL_WORLD_SIZE") or 1))


def _check_meeting_place() -> None:
    """Raise RunError unless MASTER_ADDR and MASTER_PORT say where the processes meet."""
    names = ("MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise RunError(
            f"{' and '.join(missing)} not set although RANK, WORLD_SIZE and LOCAL_RANK are: "
            "processes meet at the address and port of rank 0's machine; start with k2train.launch "
            "or torchrun, which set them, or set them in every process"
        )
    port = _count("MASTER_PORT")
    if port is None or not 0 < port < 2**16:
        raise RunError(
            f"MASTER_PORT must be a port, 1 to {2**16 - 1}, got {os.environ['MASTER_PORT']!r}"
        )


def _check_world(world_size: int) -> None:
    asked = os.environ.get("K2TRAIN_WORLD_SIZE", "")
    if asked and asked != str(world_size):
        raise RunError(
            f"{world_size} processes met where K2TRAIN_WORLD_SIZE asks for {asked}; "
            "start as many (nodes x processes a node), or unset it"
        )


STATUS_FOLDER = "K2TRAIN_VERDICTS"
"""Variable with the folder in which each process of a machine writes its status file."""


def write_status(rank: int, code: int | None, saving: bool = False, reason: str = "") -> None:
    """Write this process's exit code for the k2train launcher; None: still running.

    Does nothing under another launcher. `saving`: a save is running, so a launcher that has to end
    this process gives it time. `reason`: the signal that stopped it. The first call also asks the
    kernel to send SIGTERM when the launcher dies: an orphaned process would train on and keep the
    run's lock.
    The signal may come several times: the threads of the launcher end one after the other, and
    each hands its children to the next.
    """
    if folder := os.environ.get(STATUS_FOLDER):
        write_file(Path(folder), rank, code, saving, reason)


def another_has_stopped() -> str:
    """Return which process of this machine told the k2train launcher that it stopped, and why.

    As in "SIGUSR1 on rank 1"; "" if none did.
    """
    for rank, status in _statuses().items():
        if status.code == EXIT_STOPPED:
            return on_rank(status.reason or "a request", rank)
    return ""


def on_rank(request: str, rank: int) -> str:
    """Say which rank got a request: "SIGUSR1 on rank 1". One that names a rank stays as it is."""
    return request if " on rank " in request else f"{request} on rank {rank}"


def another_has_refused() -> bool:
    """Return whether the first end that the k2train launcher was told of here is a refusal (2)."""
    return _first_code() == EXIT_USAGE


def another_was_interrupted() -> bool:
    """Return whether the first end that the launcher was told of is that of a second Ctrl-C."""
    return _first_code() == EXIT_INTERRUPTED


def _first_code() -> int | None:
    # A process that ended without a word was ended by somebody: when is unknown here.
    told = (End(one.code, one.ended_at) for one in _statuses().values() if one.code is not None)
    first = first_end(told)
    return None if first is None else first.code


def _statuses() -> dict[int, ProcessStatus]:
    folder = os.environ.get(STATUS_FOLDER)
    with suppress(OSError):
        return read_statuses(Path(folder)) if folder else {}
    return {}


SIGNAL_SECONDS = 1.0
"""Time in which the signal of a launcher has reached all of its processes."""
ANOTHER_FAILED = "another process of the job has failed, or the job was cancelled"
"""What a SIGTERM says during a start that is no request."""


def was_asked_to_stop(signal_name: str) -> bool:
    """Return whether the signal that ended a start was a request, and no failure's consequence.

    - torchrun, and srun with --kill-on-bad-exit, end what is left of a failed job by SIGTERM. Any
      other signal is somebody's request, and a process that is alone gets none of these.
    - On one machine it is a request if the k2train launcher got a signal itself, or another process
      has stopped on request, and no process has failed or found a mistake.
    - On several machines the SIGTERM of scancel looks like srun's after a failure elsewhere, and
      under plain torchrun nobody notes anything. Both count as a failure: a failure that passes for
      a stop would not be tried again.

    Waits up to `SIGNAL_SECONDS` for the note: the signal may go to all processes of a job at once.
    """
    if signal_name != signal.SIGTERM.name or _count("WORLD_SIZE") in (None, 1):
        return True
    folder = os.environ.get(STATUS_FOLDER)
    if not folder:
        return False
    deadline = time.monotonic() + SIGNAL_SECONDS
    while (asked := _asked_by(Path(folder))) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(asked)


def means_to_save(signal_name: str) -> bool | None:
    """Return whether a signal during training is a request that leads to a save.

    False after a process of this machine has failed: a launcher ends what is left, and nothing can
    be saved. None where nobody knows. Reads files, and waits for nothing.
    """
    if signal_name != signal.SIGTERM.name or _count("WORLD_SIZE") in (None, 1):
        return True
    folder = os.environ.get(STATUS_FOLDER)
    if not folder:
        return None
    statuses = _statuses().values()
    if any(has_failed(one) or one.code == EXIT_USAGE for one in statuses):
        return False
    return True if read_signals(Path(folder)) else None


def _asked_by(folder: Path) -> bool | None:
    """Return whether the files in `folder` show a request; None as long as they show nothing."""
    with suppress(OSError):
        statuses = read_statuses(folder).values()
        if any(has_failed(one) or one.code == EXIT_USAGE for one in statuses):
            return False
        if any(one.code == EXIT_STOPPED for one in statuses):
            return True
    names = read_signals(folder)
    if not names:
        return None
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return alone or names != {signal.SIGTERM.name}


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
