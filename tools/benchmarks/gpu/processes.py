"""Subprocesses of our own modules, started so that they measure this checkout.

Standard library only, so that a machine without torch is told what is missing.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from k2train.launch.environment_defaults import deterministic_defaults
from k2train.processes import descendants

TOOLS = Path(__file__).resolve().parents[2]
ROOT = TOOLS.parent


def command_of(
    module: str,
    arguments: Sequence[str],
    variables: Mapping[str, str] | None = None,
    processes: int = 1,
) -> list[str]:
    """Command that runs a module, by torchrun for several processes.

    The checkout is first in the path, so its package is used whether or not one is installed. After
    it comes everything that this process can import. `env` sets the variables.
    """
    path = os.pathsep.join(dict.fromkeys([str(ROOT), str(TOOLS), *filter(None, sys.path)]))
    # All processes are on this machine: one whose name resolves to nothing must not matter.
    given = {
        "PYTHONPATH": path,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # Read once, at the first product: an engine made after it could not compute in strict mode.
        **deterministic_defaults(processes),
        **(variables or {}),
    }

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = launcher if processes > 1 else []
    settings = [f"{name}={value}" for name, value in given.items()]
    return ["env", *settings, sys.executable, *start, "-m", module, *arguments]


def run_to_end(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run in a session of its own, with output to `log`; returns the exit code.

    None when it was ended after `seconds`. Every process below it is ended with it.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_tree(process)


def end_tree(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads a group, that group, and all below it: trainings, ranks, compilers.

    A process below it may lead a group or session of its own, which no signal to this group meets.
    """
    below: set[int] = set()
    if process.poll() is None:
        # Stopped first, so that nothing new is started while the tree is looked at.
        _signal_group(process.pid, signal.SIGSTOP)
        while new := {*descendants([process.pid])} - below:
            _signal(new, signal.SIGSTOP)
            below |= new

    _signal_group(process.pid, signal.SIGKILL)
    _signal(below, signal.SIGKILL)
    process.wait()


def _signal(processes: Iterable[int], number: signal.Signals) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _signal_group(leader: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, number)


def last_line(log: Path) -> str:
    """Last line of a process's output, shortened for a row."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no output"
