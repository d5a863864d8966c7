"""One rank of a job that does nothing but communicate under a watchdog.

Usage: `watched.py RANK WORLD DIRECTORY STEP_LIMIT [FAULT RANK STEP]`.

What `tests/watchdog/test_watchdog.py` starts, stops and kills. Each step is some own work and
collectives; a line `step N` on stdout says how far it is. Faults are what a rank does to itself:
loop, sleep (C code that lets Python run), hold (C code that does not), raise, stop, kill.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from k2train.parallel.collectives import all_gather, all_reduce
from k2train.parallel.comm_tracker import CommTracker
from k2train.parallel.grid import Axis
from k2train.watchdog.heartbeat import read_heartbeat
from k2train.watchdog.own_heartbeat import Member
from k2train.watchdog.timeouts import Timeouts
from k2train.watchdog.watchdog import Watchdog

STEPS = int(os.environ.get("WATCHED_STEPS", "100000"))
HEARTBEAT = float(os.environ.get("WATCHED_HEARTBEAT", "0.5"))
WORK = float(os.environ.get("WATCHED_WORK", "0.02"))
COMPUTE = int(os.environ.get("WATCHED_COMPUTE", "0"))
MATRIX = torch.ones(512, 512) / 512
CLOCK_JUMP = float(os.environ.get("WATCHED_CLOCK_JUMP", "0"))


def work() -> None:
    """A rank's own part of a step."""
    if not COMPUTE:
        time.sleep(WORK)
    for _ in range(COMPUTE):
        torch.mm(MATRIX, MATRIX)


def do(fault: str) -> None:
    """Damage this rank."""
    if fault == "loop":
        while True:
            pass
    elif fault == "sleep":
        ctypes.CDLL(None).sleep(3600)
    elif fault == "hold":
        ctypes.PyDLL(None).sleep(3600)
    elif fault == "raise":
        raise ValueError("made up")
    elif fault in ("stop", "kill"):
        os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[fault])
        # With other threads the kernel may stop this one a little later; continued, it stays here.
        while True:
            signal.pause()


def seen_outside(watch: Path, rank: int, step: int) -> None:
    """Return when the heartbeat on disk says that this rank is in the step and no collective.

    A process that is stopped, or holds Python's lock, writes no further one.
    """
    while True:
        beat = read_heartbeat(watch, rank)
        if beat is not None and (beat.step, beat.current) == (step, ""):
            return
        time.sleep(0.01)


def jump_wall_clock() -> None:
    """Let the wall clock of this process jump ahead and back twice a second."""
    true_time, began = time.time, time.monotonic()
    time.time = lambda: (
        true_time() + CLOCK_JUMP * (1 if int((time.monotonic() - began) * 2) % 2 else -1)
    )


def main() -> int:
    """Run the steps."""
    rank, world, directory, limit = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        Path(sys.argv[3]),
        float(sys.argv[4]),
    )
    fault, where, when = (
        (sys.argv[5], int(sys.argv[6]), int(sys.argv[7])) if len(sys.argv) > 5 else ("", -1, -1)
    )
    torch.set_num_threads(1)
    comm = CommTracker()
    limits = Timeouts(heartbeat_seconds=HEARTBEAT, start_seconds=60.0, step_seconds=limit)
    if CLOCK_JUMP:
        jump_wall_clock()
    watch = Watchdog(
        directory / "watch",
        Member(rank, world),
        limits,
        lambda line: os.write(2, f"{line}\n".encode()) and None,
        comm.position,
    )
    store = os.environ.get("WATCHED_STORE", f"file://{directory}/store")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    watch.start()
    comm.cells = watch.cells
    axis = Axis("dp", world, rank, dist.group.WORLD, comm=comm)
    problem = ""
    try:
        for step in range(1, STEPS + 1):
            watch.phase("step", step)
            before, blocked = time.monotonic(), comm.blocked_seconds
            all_gather(torch.ones(4), axis)
            if (rank, step) == (where, when):
                if fault in ("stop", "hold"):
                    seen_outside(directory / "watch", rank, step)
                do(fault)
            work()
            all_reduce(torch.ones(1000), axis)
            seconds = time.monotonic() - before
            watch.step_done(seconds)
            own = seconds - (comm.blocked_seconds - blocked)
            os.write(1, f"step {step} {own:.6f}\n".encode())
    except RuntimeError as error:
        if not comm.broken:
            raise
        line = watch.connection_lost(error)
        if line:
            os.write(2, f"{line}\n".encode())
        os._exit(1)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        watch.close(problem)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
