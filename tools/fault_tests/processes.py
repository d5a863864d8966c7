"""Jobs of a fork server, seen from outside: start processes, wait with a bound, signal them, look
for what they left behind.

No torch here: the tool that judges must not share a fault with what it judges.
"""

import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fault_tests.forkserver import listening
from fault_tests.ports import held_port, port_of
from k2train.processes import live_processes

SERVER = Path(__file__).with_name("forkserver.py")
ROOT = SERVER.parents[2]
INHERITED = "FAULT_RUN_FORKSERVER"
"""As in `forkserver`: pipes and pid of a server that was forked for this process."""
START_SECONDS = 600.0


@dataclass
class Job:
    """The processes of one attempt."""

    pids: list[int]
    port: int
    folder: Path
    began: float
    """CLOCK_MONOTONIC at the fork."""
    ends: dict[int, tuple[int, float]] = field(default_factory=dict)
    """rank -> (exit code, minus the number of the signal that ended it; CLOCK_MONOTONIC)."""
    late: list[int] = field(default_factory=list)
    """Ranks that a launcher had to end."""
    held: socket.socket | None = None
    """Keeps the port where the ranks meet, until they have ended."""

    @property
    def over(self) -> bool:
        return len(self.ends) == len(self.pids)

    @property
    def codes(self) -> list[int]:
        return [self.ends[rank][0] for rank in sorted(self.ends)]

    @property
    def spread_seconds(self) -> float:
        """From the first end of a rank to the last."""
        times = [at for _, at in self.ends.values()]
        return max(times) - min(times)

    def text(self, stream: str = "err") -> str:
        """What all ranks wrote, in rank order."""
        return "".join(
            path.read_text(errors="replace")
            for rank in range(len(self.pids))
            if (path := self.folder / f"rank_{rank}.{stream}").exists()
        )

    def points(self) -> list[tuple[float, int, str]]:
        """(CLOCK_MONOTONIC, rank, fault point) of every place the ranks have come to, in order."""
        return [(at, rank, name) for at, rank, name in self._traced() if not name.startswith("!")]

    def first_point_seconds(self, point: str) -> float | None:
        """Seconds from the start until a rank first reached a fault point; None if none did."""
        return next((at - self.began for at, _, name in self.points() if name == point), None)

    def strikes(self) -> list[tuple[float, int, str]]:
        """(CLOCK_MONOTONIC, rank, `POINT:ACTION`) of every armed fault that struck, in order."""
        return [(at, rank, name[1:]) for at, rank, name in self._traced() if name.startswith("!")]

    def _traced(self) -> list[tuple[float, int, str]]:
        path = self.folder / "trace"
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            (float(at), int(rank), name)
            for at, rank, name in (line.split() for line in lines if line.count(" ") == 2)
        ]

    def send(self, rank: int, number: int) -> bool:
        """Signal a rank that has not been reaped; whether it was there."""
        if rank in self.ends:
            return False
        try:
            os.kill(self.pids[rank], number)
        except ProcessLookupError:
            return False
        return True


class ForkServer:
    """A context manager around the warm process; `start` a job, `wait` for it.

    `modules` are imported by the server before it forks; without any, those of a rank of a training
    run. `python` is the interpreter.
    """

    def __init__(
        self, scratch: Path, modules: Sequence[str] = (), python: str | Path = sys.executable
    ):
        self.scratch = scratch
        self.modules = modules
        self.python = python
        self.ids = itertools.count()
        self.jobs: dict[int, Job] = {}
        self._rest = b""

    def __enter__(self) -> Self:
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        inherited = os.environ.pop(INHERITED, "")
        if inherited:
            self._news_end, self._orders_end, self.pid = map(int, inherited.split())
            # Wakes it up: until now it has imported nothing.
            os.write(self._orders_end, b"\n")
        else:
            self._spawn()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._news_end, selectors.EVENT_READ)
        if not self._news(START_SECONDS):
            raise RuntimeError(f"the fork server did not start; see {self.scratch}/server.err")
        return self

    def _spawn(self) -> None:
        quiet = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "K2TRAIN"))
        }
        settings = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "lo",
            "USE_LIBUV": "1",
        }
        with (self.scratch / "server.err").open("wb") as errors:
            self._process = subprocess.Popen(
                [self.python, str(SERVER), *self.modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**quiet, **settings},
                cwd=ROOT,
                # A signal to the group of the tool must not end the server before its jobs.
                process_group=0,
            )
        assert self._process.stdin is not None and self._process.stdout is not None, (
            "pipes were asked for"
        )
        self._orders_end, self._news_end = (
            self._process.stdin.fileno(),
            self._process.stdout.fileno(),
        )
        self.pid = self._process.pid

    def __exit__(self, *_: object) -> None:
        for job in self.jobs.values():
            self.end(job)
        self._selector.close()
        if self._process is not None:
            self._process.communicate(timeout=START_SECONDS)

    def begin(
        self,
        arguments: Sequence[object],
        ranks: int = 1,
        faults: str = "",
        environments: Sequence[Mapping[str, str]] = (),
    ) -> Job:
        """Fork the ranks of one attempt of a training run, their fault points traced."""
        folder = self._folder()
        shared = {
            "FAULT_RUN_TRACE": str(folder / "trace"),
            "WORLD_SIZE": str(ranks),
            "K2TRAIN_FAULTS": faults,
        }
        command = ["-m", "k2train.train", *map(str, arguments)]
        own = environments or [{}] * ranks
        return self._fork([command] * ranks, [{**shared, **one} for one in own], folder)

    def start(
        self,
        commands: Sequence[Sequence[object]],
        environment: Mapping[str, str],
        folder: Path = ROOT,
        launched: bool = False,
        merged: bool = False,
        own: Sequence[Mapping[str, str]] = (),
    ) -> Job:
        """Fork one process a command (see `forkserver`), with this environment and what it gets of
        its `own`.

        `launched`: they are the ranks of one job, as a launcher starts them. `merged`: stdout holds
        stderr too.
        """
        world = {"WORLD_SIZE": str(len(commands))} if launched else {}
        variables = [{**environment, **world, **one} for one in own or [{}] * len(commands)]
        return self._fork(commands, variables, self._folder(), folder, launched, True, merged)

    def _folder(self) -> Path:
        folder = self.scratch / f"job_{len(self.jobs):05d}"
        folder.mkdir(parents=True)
        return folder

    def _fork(
        self,
        commands: Sequence[Sequence[object]],
        environments: Sequence[Mapping[str, str]],
        scratch: Path,
        folder: Path = ROOT,
        launched: bool = True,
        replace: bool = False,
        merged: bool = False,
    ) -> Job:
        """Returns when the pids are known."""
        number, held = next(self.ids), held_port()
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port_of(held))}
        orders = [
            {
                "rank": rank,
                "command": [str(part) for part in command],
                "environment": {
                    **(meeting if launched else {}),
                    **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if launched else {}),
                    **environments[rank],
                },
                "replace": replace,
                "stdout": str(scratch / f"rank_{rank}.out"),
                "stderr": str(scratch / f"rank_{rank}.{'out' if merged else 'err'}"),
            }
            for rank, command in enumerate(commands)
        ]
        job = self.jobs[number] = Job([], port_of(held), scratch, time.monotonic(), held=held)
        self._order({"job": number, "ranks": orders, "folder": str(folder)})
        deadline = time.monotonic() + START_SECONDS
        while not job.pids:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the fork server has not forked in {START_SECONDS:.0f} s")
            self._news(1.0)
        return job

    def wait(self, job: Job, seconds: float) -> bool:
        """Until every rank has ended, at most so long; whether they have."""
        deadline = time.monotonic() + seconds
        while not job.over and (left := deadline - time.monotonic()) > 0:
            self._news(left)
        return job.over

    def wait_as_launcher(
        self, job: Job, seconds: float, grace: float, patience: float | None = None
    ) -> str:
        """Wait; when a rank has ended badly and others have not within `grace`, end those as a
        launcher does.

        `patience`: how long they have to end when asked to, `grace` if not given. Returns what had
        to be done: "" when all ended by themselves.
        """
        deadline = time.monotonic() + seconds
        while not job.over:
            bad = [at for code, at in job.ends.values() if code != 0]
            until = min(deadline, min(bad) + grace) if bad else deadline
            if (left := until - time.monotonic()) > 0:
                self._news(left)
                continue
            late = job.late = [rank for rank in range(len(job.pids)) if rank not in job.ends]
            for rank in late:
                job.send(rank, signal.SIGTERM)
            if not self.wait(job, grace if patience is None else patience):
                self.end(job)
                return f"ranks {late} had to be killed"
            return f"ranks {late} had to be asked to end"
        return ""

    def poll(self) -> None:
        """Take in what has happened since."""
        while self._news(0.0):
            pass

    def end(self, job: Job) -> None:
        """Kill what still lives of a job."""
        for rank in range(len(job.pids)):
            job.send(rank, signal.SIGKILL)
        self.wait(job, 30)

    def left_behind(self, job: Job) -> list[str]:
        """Processes of the job's group or below the server that live after it, and its port if it
        is still listened to.
        """
        found = [
            f"process {pid} ({what}) lives on"
            for pid, what in processes_of(job.pids[0], self.pid, self._live())
        ]
        if job.port in listening():
            found.append(f"port {job.port} is still listened to")
        return found

    def _live(self) -> set[int]:
        return {
            pid
            for job in self.jobs.values()
            for rank, pid in enumerate(job.pids)
            if rank not in job.ends
        }

    def _order(self, order: dict[str, Any]) -> None:
        data = json.dumps(order).encode() + b"\n"
        while data:
            data = data[os.write(self._orders_end, data) :]

    def _news(self, seconds: float) -> bool:
        """Take in one batch of news; False when none came in time."""
        if not self._selector.select(seconds):
            return False
        piece = os.read(self._news_end, 1 << 16)
        if not piece:
            raise RuntimeError(f"the fork server has ended; see {self.scratch}/server.err")
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            fact = json.loads(line)
            if "pids" in fact:
                self.jobs[fact["job"]].pids = fact["pids"]
                self.jobs[fact["job"]].began = fact["at"]
            elif fact.get("job", -1) >= 0:
                code, job = os.waitstatus_to_exitcode(fact["status"]), self.jobs[fact["job"]]
                job.ends[fact["rank"]] = (code, fact["at"])
                if job.over and job.held is not None:
                    job.held.close()
        return True


def processes_of(group: int, server: int, known: set[int]) -> list[tuple[int, str]]:
    """Live processes of a process group, and children of the server that are no rank we know of."""
    return [
        (pid, stat.name)
        for pid, stat in live_processes().items()
        if pid not in known and (stat.group == group or stat.parent == server)
    ]
