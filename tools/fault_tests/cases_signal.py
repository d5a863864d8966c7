"""Fault rows 8 to 11: stop requests, SIGSTOP, a cut network, and slow ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from fault_tests.cases_kill import tail
from fault_tests.processes import ROOT, Job, free_port
from fault_tests.restarts import Attempt
from fault_tests.result import (
    Bench,
    Result,
    allowed_seconds,
    chain,
    names_rank,
    problems_of,
    run_pytest,
    spread,
)
from fault_tests.tiny_run import TinyRun
from k2train.errors import EXIT_DONE, EXIT_STOPPED
from k2train.record.events import Straggler, of_kind
from k2train.record.ledger import read_ledger

HANG_SECONDS = 20.0
NAMED_STEPS = 20
SLOW = re.compile(r"\bis slow\b")


def row_8(bench: Bench) -> Result:
    """Row 8: SIGTERM and SIGUSR1 at every point."""
    result = Result(
        8,
        "SIGTERM, SIGUSR1, SIGINT with a time of grace",
        "looked at every step; saved; exit code 75; a save that cannot finish leaves the old one "
        "valid; same bits",
        "the signal at step and save points, to one rank alone or all; then through the launcher; "
        "then SIGKILL during the save",
    )

    world = bench.world(8, 3)

    points = (
        "step.read",
        "start.loaded",
        "step.forward",
        "step.reduce",
        "step.done",
        "save.model",
        "save.renamed",
    )

    faults = [f"{point}@rank=0@nth=1:{what}" for what in ("term", "usr1") for point in points]
    all_restarts = chain(bench, world, "row8", faults[:: 4 if bench.short else 1])
    attempts = [a for c in all_restarts for a in c.attempts if a.faults]
    stopped = [a for a in attempts if set(a.codes) == {EXIT_STOPPED}]
    result.problems += problems_of(all_restarts)
    result.problems += [
        f"{a.faults}: ended with {a.codes}: {tail(a.text)}"
        for a in attempts
        if a not in stopped and set(a.codes) != {EXIT_DONE}
    ]
    result.measured.append(
        f"{len(stopped)} of {len(attempts)} requests at {len(points)} places ended with 75 on "
        "every rank"
    )
    if not bench.short:
        _through_launcher(bench, world, result)
    return result


def _through_launcher(bench: Bench, world: TinyRun, result: Result) -> None:
    """The real command line: SIGTERM to the launcher alone, then the same command to the end."""
    name, seconds = bench.name("launched"), []
    launch = [
        sys.executable,
        "-m",
        "k2train.launch",
        "--nproc-per-node",
        str(world.ranks),
        "--master-port",
        str(free_port()),
    ]

    command = [*launch, "-m", "k2train.train", *world.arguments(name)]
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "K2TRAIN"))
    }

    environment = {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "K2TRAIN_FAULTS": "step.done@nth=5:sleep=1",
    }

    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    wanted = world.run(name) / "checkpoints" / "ckpt_001" / "manifest.json"
    deadline = time.monotonic() + 90
    while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=120)
    seconds.append(time.monotonic() - began)
    if process.returncode != EXIT_STOPPED:
        result.problems.append(
            f"the launcher ended with {process.returncode} after SIGTERM: {output[-300:]}"
        )
        return

    result.measured.append(f"launcher: SIGTERM to 75 in {seconds[0]:.1f} s")
    restarts = bench.restarts(world, "launched")
    restarts.name = name
    restarts.finish()
    result.problems += restarts.problems


def row_9(bench: Bench) -> Result:
    """Row 9: a rank stopped by SIGSTOP."""
    result = Result(
        9,
        "A rank hangs (SIGSTOP)",
        "rank, collective, step and phase named, and nobody left alive, within twice the 99th "
        f"percentile of a step (floor 10 s) and the time it takes to look ({HANG_SECONDS:.0f} s in "
        "all); same bits",
        "SIGSTOP at two points of the 25th step of an attempt, to each rank, 2 ranks and 4; then "
        "the same command",
    )

    made: list[Attempt] = []
    # The limit of a step is learnt from the first twenty; until then that of the start counts.
    world = bench.world(20, 3)
    worlds = [world] if bench.short else [world, world.on(4, tensor=2, pipeline=2)]

    for world in worlds:
        faults = [
            f"{point}@rank={rank}@nth=25:stop"
            for point in ("step.forward", "step.update")
            for rank in range(world.ranks)
        ]
        all_restarts = chain(
            bench, world, "row9", faults[:: 3 if bench.short else 1 if world.ranks == 2 else 3]
        )
        made += [a for c in all_restarts for a in c.attempts if a.faults]
        result.problems += problems_of(all_restarts)

    seconds, named = [], 0
    for attempt in made:
        rank = int(attempt.faults.partition("rank=")[2].partition("@")[0])
        seconds.append(since_point(attempt.job, rank))
        named += names_rank(attempt.text, rank)
        if not names_rank(attempt.text, rank):
            result.problems.append(f"{attempt.faults}: not named: {tail(attempt.text)}")

    result.measured.append(
        f"from SIGSTOP to the last rank's end: {spread(seconds)}; named in {named} of {len(made)}"
    )
    limit = allowed_seconds(HANG_SECONDS, made)
    result.problems += [
        f"{a.faults}: {s:.0f} s" for a, s in zip(made, seconds, strict=True) if s > limit
    ]
    return result


def since_point(job: Job, rank: int) -> float:
    """Seconds from the last point that `rank` reached until the last rank had ended."""
    last = max((at for at, r, _ in job.points() if r == rank), default=job.began)
    return max(at for _, at in job.ends.values()) - last


def row_10(bench: Bench) -> Result:
    """Row 10: a network that is cut for a time or for good."""
    result = Result(
        10,
        "The network between two ranks is cut, for good or for a moment",
        "the bound of row 9; a short cut survives or restarts with the same bits",
        "two network namespaces joined by a virtual cable, one rank in each; the cable taken down",
    )

    with Cable() as problem:
        if problem:
            result.missing.append(f"network namespaces: {problem}")
            return result
        world = bench.world(8, 3).changed(("watch.step_seconds", 10))
        for down in (None, 3.0):
            restarts = bench.restarts(world, "row10")
            attempt = restarts.attempt_with(Cable.environments(), partial(Cable.cut, seconds=down))
            duration = "for good" if down is None else f"for {down:.0f} s"
            since = max(at for _, at in attempt.job.ends.values()) - Cable.cut_at
            told_by = [
                x
                for x in attempt.text.splitlines()
                if re.search(r"rank \d+.*(stuck|died|lost|behind)", x)
            ]
            line = told_by[0] if told_by else ""
            if down is None and (
                set(attempt.codes) == {EXIT_DONE}
                or since > allowed_seconds(HANG_SECONDS, [attempt])
            ):
                result.problems.append(
                    f"cut {duration}: codes {attempt.codes}, {since:.0f} s: {tail(attempt.text)}"
                )
            if down is None and not line:
                result.problems.append(
                    f"cut {duration}: no line names a rank: {tail(attempt.text)}"
                )
            result.measured.append(
                f"cut {duration}: ended with {attempt.codes} {since:.1f} s after; {line[:300]}"
            )
            restarts.finish()
            result.problems += restarts.problems

    return result


class Cable:
    """Two network namespaces with a pair of virtual devices.

    Yields why they are not possible, or "".
    """

    names = (f"k2f{os.getpid()}a", f"k2f{os.getpid()}b")
    cut_at = 0.0

    def __enter__(self) -> str:
        if os.geteuid() != 0:
            return "they need root"
        a, b = self.names

        steps = [
            f"ip netns add {a}", f"ip netns add {b}", f"ip link add {a} netns {a} type veth peer "
                                                      f"name {b} netns {b}",
            f"ip -n {a} addr add 10.213.0.1/24 dev {a}", f"ip -n {b} addr add 10.213.0.2/24 dev "
                                                         f"{b}",
            f"ip -n {a} link set {a} up", f"ip -n {b} link set {b} up", f"ip -n {a} link set lo "
                                                                        "up", f"ip -n {b} link set "
                                                                              "lo up",
        ]  # fmt: skip

        for step in steps:
            try:
                done = subprocess.run(step.split(), capture_output=True, text=True)
            except FileNotFoundError:
                return "the command `ip` is not installed"
            if done.returncode:
                return f"`{step}`: {done.stderr.strip()}"

        return ""

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            if Path(f"/run/netns/{name}").exists():
                subprocess.run(["ip", "netns", "del", name], capture_output=True)

    @classmethod
    def environments(cls) -> list[dict[str, str]]:
        """Environment variables of the two ranks."""
        return [
            {
                "FAULT_RUN_NETNS": f"/run/netns/{name}",
                "MASTER_ADDR": "10.213.0.1",
                "GLOO_SOCKET_IFNAME": name,
            }
            for name in cls.names
        ]

    @classmethod
    def cut(cls, job: Job, seconds: float | None) -> None:
        """Take the cable down after four steps, and up again after `seconds`."""
        deadline = time.monotonic() + 60
        while (
            sum(name == "step.done" for _, _, name in job.points()) < 8
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)

        a = cls.names[0]
        subprocess.run(["ip", "-n", a, "link", "set", a, "down"], check=True)
        cls.cut_at = time.monotonic()
        if seconds is not None:
            time.sleep(seconds)
            subprocess.run(["ip", "-n", a, "link", "set", a, "up"], check=True)


def row_11(bench: Bench) -> Result:
    """Row 11: a slow rank."""
    result = Result(
        11,
        "One rank is slow in every step",
        "named within 20 steps; no false name in a clean run",
        "a sleep of 0.05 s in each step of one rank from step 30 on; a clean run of as many steps "
        "as the undisturbed one",
    )

    world = bench.world(40, 5)
    first, delays = 30, []

    for rank in range(world.ranks)[: 1 if bench.short else None]:
        faults = ";".join(
            f"step.forward@rank={rank}@step={step}:sleep=0.05" for step in range(first, first + 60)
        )
        name = bench.name("row11")
        job = bench.server.begin(
            world.arguments(name, f"run.stop_after_steps={first + 60}"), world.ranks, faults
        )
        bench.server.wait(job, 240)
        bench.server.end(job)
        named = [
            (step, message) for step, message in stragglers(world.run(name)) if SLOW.search(message)
        ]
        wrong = [
            message for step, message in named if f"rank {rank} " not in message or step < first
        ]
        result.problems += [f"rank {rank} slow from step {first}: {message}" for message in wrong]
        right = [step for step, message in named if message not in wrong]
        if not right or right[0] > first + NAMED_STEPS:
            result.problems.append(
                f"rank {rank} was not named within {NAMED_STEPS} steps: {named} {tail(job.text())}"
            )
            continue
        # A step exchanges the times of the step before it.
        delays.append(right[0] - first)

    if delays:
        result.measured.append(
            f"named {max(delays)} steps after the first slow one at the latest ({len(delays)} runs)"
        )

    clean = bench.name("clean")
    job = bench.server.begin(world.arguments(clean), world.ranks)
    bench.server.wait(job, 240)
    bench.server.end(job)
    false = [message for _, message in stragglers(world.run(clean))]
    result.measured.append(
        f"clean run of {world.steps} steps on cores shared with other programs: {len(false)} names"
    )
    result.problems += [f"clean run: {line}" for line in false]
    run_pytest(
        result, ["tests/guard/test_stragglers.py"], bench.scratch, "simulated noise and slow ranks"
    )
    return result


def stragglers(run: Path) -> list[tuple[int, str]]:
    """(step, message) of every rank that became slow or recovered."""
    found = of_kind(read_ledger(run / "ledger.jsonl"), Straggler)
    return [(straggler.step, straggler.told) for straggler in found]
