"""Warm processes for tests: programs started by the fork server of the fault tests, one server for
each test process.

- `start` and `run` take what follows `python` on a command line, like `subprocess.Popen` and
  `subprocess.run`.
- A program starts in milliseconds: torch and k2train are imported already. Tests of the start
  itself (what is imported, how fast a mistake is reported, launchers) start a new interpreter
  instead.
- Nothing of an earlier program remains: each is forked off the same server, which does no work
  itself.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from fault_tests.forkserver import MODULES  # noqa: E402
from fault_tests.processes import INHERITED, ForkServer, Job  # noqa: E402

PATIENCE_SECONDS = float(os.environ.get("TEST_PATIENCE_SECONDS", "600"))
"""A guard against waiting for ever; no test is meant to come near it, however busy the machine is.
"""
MORE = ("k2train.launch.__main__", "torch.distributed.run", "pytest", "hypothesis")
"""What tests start besides the ranks of a run."""
GRACE_SECONDS = 0.5
"""How long ranks have to end by themselves when one of them has failed: torchrun gives them as
little.
"""
_servers: dict[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], ForkServer] = {}


def server(modules: Sequence[str] = (*MODULES, *MORE), **variables: str) -> ForkServer:
    """The server of this test process that has imported `modules`, started at its first use.

    There is another one for each set of environment variables that its imports are to see.
    """
    key = tuple(modules), tuple(sorted(variables.items()))
    if key not in _servers:
        folder = Path(tempfile.mkdtemp(prefix="k2train-forkserver-"))
        started = ForkServer(folder, modules)
        # Not by pytest: the processes of another Python import this, too.
        with mock.patch.dict(os.environ, variables):
            if variables or key[0] != (*MODULES, *MORE):
                # The server that is already running has imported everything without them.
                os.environ.pop(INHERITED, None)
            _servers[key] = started.__enter__()
    return _servers[key]


def close() -> None:
    """End the server, if one was started, and remove what its processes wrote."""
    while _servers:
        _, ended = _servers.popitem()
        ended.__exit__()
        shutil.rmtree(ended.scratch, ignore_errors=True)


class Process:
    """The part of `subprocess.Popen` that tests use, over the processes of one job; `returncode` as
    a launcher's.
    """

    def __init__(self, job: Job, merged: bool, started_by: ForkServer):
        self.job, self.merged, self.server = job, merged, started_by

    @property
    def pids(self) -> list[int]:
        return self.job.pids

    @property
    def pid(self) -> int:
        """The only process of the job."""
        (only,) = self.job.pids
        return only

    @property
    def returncode(self) -> int | None:
        """Once all have ended: 0 when all codes are 0, else the first other one that is no
        consequence of another.
        """
        if not self.job.over:
            return None
        bad = [code for code in self.job.codes if code]
        return next((code for code in bad if code != -signal.SIGTERM), bad[0]) if bad else 0

    def poll(self) -> int | None:
        self.server.poll()
        return self.returncode

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        """Until all have ended; when one fails, the others are asked to end, as a launcher does."""
        self.server.wait_as_launcher(self.job, timeout, GRACE_SECONDS, timeout)
        if not self.job.over:
            raise subprocess.TimeoutExpired("a warm process", timeout)
        assert self.returncode is not None, "it has ended"
        return self.returncode

    def communicate(self, timeout: float = PATIENCE_SECONDS) -> tuple[str, str]:
        """Wait for the end; stdout and stderr of all ranks, in rank order."""
        self.wait(timeout)
        return self.output(), self.job.text("err")

    def output(self) -> str:
        """What has been written to stdout so far."""
        return self.job.text("out")

    def send_signal(self, number: int) -> None:
        self.server.poll()
        for rank in range(len(self.job.pids)):
            self.job.send(rank, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    command: Sequence[object],
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    processes: int = 1,
    merged: bool = True,
    on: ForkServer | None = None,
) -> Process:
    """Start `python COMMAND`; several `processes` are the ranks of one job.

    `on` is another server than that of all tests.
    """
    variables, by = dict(os.environ if environment is None else environment), on or server()
    job = by.start([command] * processes, variables, folder, processes > 1, merged)
    return Process(job, merged, by)


def run(
    command: Sequence[object],
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    processes: int = 1,
    timeout: float = PATIENCE_SECONDS,
    on: ForkServer | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run `python COMMAND` to its end."""
    process = start(command, environment, folder, processes, merged=False, on=on)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess([str(part) for part in command], process.wait(), out, err)
