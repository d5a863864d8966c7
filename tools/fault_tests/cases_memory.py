"""The kernel kills a rank because its memory limit is met: the second part of fault row 1.

- All ranks are in one memory group (cgroup) with a process that fills it up on command.
- The limit is met while the chosen rank is in a step or in a save; the SIGKILL comes there.
- Now and then the kernel kills a second rank before the memory of the first one is back. Nobody is
  left to name the dead then: the run goes on, the kill is counted apart, and tried again.
"""

import os
import signal
import time
from collections.abc import Callable

from fault_tests.memory_group import MemoryGroup
from fault_tests.processes import ForkServer, Job
from fault_tests.restarts import Attempt, Restarts
from fault_tests.result import Bench, Result, problems_of

POINTS = (
    "step.forward",
    "step.reduce",
    "step.update",
    "save.snapshot",
    "save.model",
    "save.hashed",
)
HELD_SECONDS = 5
"""How long the rank stays at its point, at most: the kill comes within this time."""
WAIT_SECONDS = 240.0
TRIES = 3


def memory_kills(bench: Bench, result: Result) -> list[Attempt]:
    """Kill each rank at each point; the attempts in which the kernel killed it."""
    all_restarts: list[Restarts] = []
    world = bench.world(8, 3)
    struck: list[Attempt] = []
    of_several = 0
    cases = [(point, rank) for point in POINTS for rank in range(world.ranks)]

    for number, (point, rank) in enumerate(cases[:: 6 if bench.short else 1]):
        if bench.time_is_up:
            result.missing.append(f"memory limit: the time was up after {number} kills")
            break
        for _ in range(TRIES):
            if not all_restarts or all_restarts[-1].done:
                all_restarts.append(bench.restarts(world, "memory"))
            made, problem = _kill(bench.server, all_restarts[-1], number, point, rank)
            if problem:
                result.missing.append(f"memory limit: {problem}")
                return []
            killed = made.codes.count(-signal.SIGKILL)
            of_several += killed > 1
            if made.struck and killed == 1:
                struck.append(made)
                break
        else:
            result.missing.append(f"memory limit: rank {rank} alone was not killed at {point}")

    if all_restarts:
        all_restarts[-1].finish()
    result.problems += problems_of(all_restarts)
    result.measured.append(
        f"{len(struck)} ranks killed by the kernel at the memory limit of their cgroup, in steps "
        f"and saves, in {len(all_restarts)} runs; {of_several} times it killed all of them at once"
    )
    return struck


def _kill(
    server: ForkServer, restarts: Restarts, number: int, point: str, rank: int
) -> tuple[Attempt, str]:
    """One attempt whose rank meets the limit at `point`; (attempt, why that is not possible)."""
    with MemoryGroup(f"k2train_faults_{os.getpid()}_{number}") as group:

        def during(job: Job) -> None:
            if group.problem:
                return
            group.add(job.pids, job.pids[rank])
            group.start_hog()
            _wait(server, job, lambda: bool(job.strikes()))
            if job.over:
                return
            group.fill()
            _wait(server, job, lambda: group.kills > 0)
            group.end_hog()

        fault = f"{point}@rank={rank}@nth=3:sleep={HELD_SECONDS}"
        made = restarts.attempt(fault, during)
        dead = made.codes[rank] == -signal.SIGKILL
        if not group.problem and dead != bool(made.job.strikes()):
            restarts.problems.append(f"{fault}: the kernel killed {group.kills} processes")
        return made, group.problem


def _wait(server: ForkServer, job: Job, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition() and not job.over and time.monotonic() < deadline:
        server.wait(job, 0.01)
