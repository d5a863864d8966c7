"""Fault row 10: the network between two ranks is cut, flaps, or loses packets in one direction.

- Two network namespaces joined by a virtual cable, with one rank in each. Only `ip` is needed.
- One direction is cut by a wrong hardware address for the other side: packets leave and nobody
  takes them, and neither side gets an error.

Alternatives considered:
- The kernel's packet loss emulator (tc netem): many kernels are built without it.
"""

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fault_tests.cases_kill import tail
from fault_tests.processes import ForkServer, Job
from fault_tests.restarts import Attempt
from fault_tests.result import HANG_SECONDS, Bench, Result, allowed_seconds
from k2train.errors import EXIT_DONE

STEPS_BEFORE = 4
WAIT_SECONDS = 240.0
NOWHERE = "02:00:00:00:00:99"
"""A hardware address that no device has."""
BURST_SECONDS = 0.2
ADDRESSES = ("10.213.0.1", "10.213.0.2")
NAMED = re.compile(r"rank \d+.*(stuck|died|lost|behind)")


@dataclass(frozen=True)
class Cut:
    """One way to cut the network while steps are taken."""

    what: str
    seconds: float | None
    """How long; None for good."""
    timeout_seconds: int
    """`watch.step_seconds` of the run."""
    sides: tuple[int, ...] = ()
    """Ranks whose packets are lost; empty: the cable is down."""
    bursts: bool = False
    """True: packets are lost half of the time."""


CUTS = (
    Cut("the cable", None, 10),
    Cut("the cable", 3.0, 10),
    Cut("the cable", 30.0, 10),
    Cut("the cable", 30.0, 120),
    Cut("what rank 0 sends", None, 10, (0,)),
    Cut("what rank 1 sends", None, 10, (1,)),
    Cut("what rank 1 sends", 3.0, 10, (1,)),
    Cut("what rank 0 sends, half of the time", 10.0, 60, (0,), bursts=True),
)
SHORT = (0, 1)


def row_10(bench: Bench) -> Result:
    """Row 10: a network that is cut for a time or for good."""
    result = Result(
        10,
        "The network between two ranks is cut, for good or for a moment",
        "the bound of row 9; a short cut survives or restarts with the same bits",
        "two network namespaces joined by a virtual cable, one rank in each; the cable taken down "
        "for good, for 3 s and for 30 s, or the packets of one direction lost, for good, for 3 s "
        "and in bursts",
    )

    with Cable() as cable:
        if cable.problem:
            result.missing.append(f"network namespaces: {cable.problem}")
            return result
        for cut in [CUTS[index] for index in SHORT] if bench.short else CUTS:
            _cut_once(bench, result, cable, cut)
    return result


def _cut_once(bench: Bench, result: Result, cable: "Cable", cut: Cut) -> None:
    """One attempt under a cut, then the same command on a sound network to the end."""
    world = bench.world(8, 3).changed(("watch.step_seconds", cut.timeout_seconds))
    restarts = bench.restarts(world, "row10")
    cut_at: list[float] = []

    def during(job: Job) -> None:
        if not _steps_taken(bench.server, job):
            return
        cut_at.append(time.monotonic())
        cable.cut(cut, bench.server, job)

    attempt = restarts.attempt_with(cable.environments(), during)
    cable.restore()
    duration = "for good" if cut.seconds is None else f"for {cut.seconds:.0f} s"
    label = f"{cut.what} cut {duration} (timeout of a step {cut.timeout_seconds} s)"
    bench.log(f"row 10: {label}: {attempt.codes}")
    if not cut_at:
        result.problems.append(f"{label}: no steps were taken: {tail(attempt.text)}")
        return

    since = max(at for _, at in attempt.job.ends.values()) - cut_at[0]
    line = next((x for x in attempt.text.splitlines() if NAMED.search(x)), "")
    result.problems += _end_problems(label, cut, attempt, since, line)
    result.measured.append(
        f"{label}: ended with {attempt.codes} {since:.1f} s after{'; ' if line else ''}{line[:300]}"
    )
    restarts.finish()
    result.problems += restarts.problems


def _steps_taken(server: ForkServer, job: Job) -> bool:
    """Wait until each rank has taken some steps; False when the job is over before."""
    deadline = time.monotonic() + WAIT_SECONDS
    wanted = STEPS_BEFORE * len(job.pids)
    while sum(name == "step.done" for _, _, name in job.points()) < wanted:
        if job.over or time.monotonic() > deadline:
            return False
        server.wait(job, 0.01)
    return not job.over


def _end_problems(label: str, cut: Cut, attempt: Attempt, since: float, line: str) -> list[str]:
    """What a cut that outlasts the timeout must come to; a shorter one may end as it likes."""
    if cut.seconds is not None and (cut.bursts or cut.seconds < cut.timeout_seconds):
        return []
    found = []
    if set(attempt.codes) == {EXIT_DONE} or since > allowed_seconds(HANG_SECONDS, [attempt]):
        found.append(f"{label}: codes {attempt.codes}, {since:.0f} s: {tail(attempt.text)}")
    if not line:
        found.append(f"{label}: no line names a rank: {tail(attempt.text)}")
    return found


class Cable:
    """Context manager: two network namespaces with a pair of virtual devices, or the reason in
    `problem` why not.
    """

    def __init__(self) -> None:
        self.names = (f"k2f{os.getpid()}a", f"k2f{os.getpid()}b")
        self.problem = ""

    def __enter__(self) -> Self:
        a, b = self.names
        if os.geteuid() != 0:
            self.problem = "they need root"
        elif shutil.which("ip") is None:
            self.problem = "the command `ip` is not installed"
        else:
            steps = [f"netns add {a}", f"netns add {b}"]
            steps.append(f"link add {a} netns {a} type veth peer name {b} netns {b}")
            for name, address in zip(self.names, ADDRESSES, strict=True):
                steps.append(f"-n {name} addr add {address}/24 dev {name}")
                steps += [f"-n {name} link set {device} up" for device in (name, "lo")]
            self.problem = next((told for step in steps if (told := _ip(step))), "")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            if Path(f"/run/netns/{name}").exists():
                _ip(f"netns del {name}")

    def environments(self) -> list[dict[str, str]]:
        """Environment variables of the two ranks."""
        return [
            {
                "FAULT_RUN_NETNS": f"/run/netns/{name}",
                "MASTER_ADDR": ADDRESSES[0],
                "GLOO_SOCKET_IFNAME": name,
            }
            for name in self.names
        ]

    def cut(self, cut: Cut, server: ForkServer, job: Job) -> None:
        """Cut, and mend again after its seconds or when the job is over, if not for good."""
        self._set(cut, lost=True)
        if cut.seconds is None:
            return

        until = time.monotonic() + cut.seconds
        lost = True
        while (left := until - time.monotonic()) > 0 and not job.over:
            server.wait(job, min(left, BURST_SECONDS) if cut.bursts else left)
            if cut.bursts:
                lost = not lost
                self._set(cut, lost)
        self.restore()

    def restore(self) -> None:
        """A sound network, whatever was cut."""
        for side, name in enumerate(self.names):
            _must(f"-n {name} link set {name} up")
            self._let_through(side)

    def _set(self, cut: Cut, lost: bool) -> None:
        if not cut.sides:
            _must(f"-n {self.names[0]} link set {self.names[0]} {'down' if lost else 'up'}")
        for side in cut.sides:
            if lost:
                name, other = self.names[side], ADDRESSES[1 - side]
                _must(f"-n {name} neigh replace {other} lladdr {NOWHERE} dev {name} nud permanent")
            else:
                self._let_through(side)

    def _let_through(self, side: int) -> None:
        """Forget the wrong address; the kernel asks for the right one again."""
        name = self.names[side]
        _must(f"-n {name} neigh flush nud permanent dev {name}")


def _ip(arguments: str) -> str:
    """Run `ip`; returns what it complained about, "" when it succeeded."""
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True)
    return f"`ip {arguments}`: {done.stderr.strip()}" if done.returncode else ""


def _must(arguments: str) -> None:
    if problem := _ip(arguments):
        raise RuntimeError(problem)
