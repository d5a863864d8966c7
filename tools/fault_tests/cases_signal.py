"""Fault rows 8, 9 and 11: stop requests, SIGSTOP, and slow ranks."""

import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from fault_tests.cases_kill import tail
from fault_tests.launched import launch
from fault_tests.processes import ForkServer, Job
from fault_tests.restarts import LIMIT_SECONDS, Attempt, Restarts
from fault_tests.result import (
    HANG_SECONDS,
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

NAMED_STEPS = 20
GRACE_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_ENDS = (
    "save.begin",
    "save.model",
    "save.hashed",
    "save.manifest",
    "save.synced",
    "save.renamed",
)
"""Where the time of grace is over, one attempt each."""
FIRST_GRACE_STEP = 4
HELD_SECONDS = 0.3
WAIT_SECONDS = 240.0
SLOW = re.compile(r"\bis slow\b")


def row_8(bench: Bench) -> Result:
    """Row 8: SIGTERM and SIGUSR1 at every point."""
    result = Result(
        8,
        "SIGTERM, SIGUSR1, SIGINT with a time of grace",
        "looked at every step; saved; exit code 75; a save that cannot finish leaves the old one "
        "valid; same bits",
        "the signal at step and save points, to one rank alone or all; with a time of grace that "
        "ends (SIGKILL to all) at each point of the save that it asks for; through the launcher; "
        "and two nodes on a real SLURM: a time limit, a cancelled job, a lost node, a crash",
    )

    world = bench.world(8, 3)

    points = (
        "step.read",
        "step.forward",
        "start.loaded",
        "step.reduce",
        "step.done",
        "save.model",
        "save.renamed",
    )

    # During a start SIGTERM to one of several ranks, past the launcher, counts as a failure.
    faults = [
        f"{point}@rank=0@nth=1:{what}"
        for what in ("term", "usr1")
        for point in points
        if (what, point) != ("term", "start.loaded")
    ]
    faults = faults[:: 4 if bench.short else 1]
    all_restarts = chain(bench, world, "row8", faults)
    attempts = struck_of(result, all_restarts, faults)
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
    _with_grace(bench, world, result)
    if not bench.short:
        for number in GRACE_SIGNALS:
            _through_launcher(bench, world, result, number)
        node = "tests/system/test_slurm_train.py"
        run_pytest(result, [node], bench.scratch, "two nodes on a real SLURM")
    return result


def struck_of(
    result: Result, all_restarts: Sequence[Restarts], faults: Sequence[str]
) -> list[Attempt]:
    """Attempts whose fault fired.

    A run may be done before a rank reaches its point; the chain then tries a new one. What never
    fired is missing.
    """
    struck = [a for c in all_restarts for a in c.attempts if a.job.strikes()]
    never = set(faults) - {a.faults for a in struck}
    result.missing += [f"{fault} was not reached" for fault in sorted(never)]
    return struck


def _with_grace(bench: Bench, world: TinyRun, result: Result) -> None:
    """Signals by hand: each must end with 75 in time; where the grace ends in the save that it
    asked for, the next start must find a whole checkpoint.
    """
    cases = [(number, ranks, "") for number in GRACE_SIGNALS for ranks in ((0,), (1,), (0, 1))]
    cases += [
        (GRACE_SIGNALS[index % len(GRACE_SIGNALS)], (0, 1), point)
        for index, point in enumerate(GRACE_ENDS)
    ]
    all_restarts, waited, cut = [bench.restarts(world, "grace")], list[float](), 0

    for number, ranks, point in cases[:: 7 if bench.short else 1]:
        if bench.time_is_up:
            result.missing.append("a time of grace: the time was up")
            break
        step = _next_step(all_restarts[-1], world)
        if step is None:
            all_restarts[-1].finish()
            all_restarts.append(bench.restarts(world, "grace"))
            step = FIRST_GRACE_STEP
        warned = Warned(bench.server, number, ranks, point)
        attempt = all_restarts[-1].attempt(warned.faults(step), warned)
        bench.log(f"row 8: {number.name} to ranks {ranks} {point or 'saved'}: {attempt.codes}")
        wanted = -int(signal.SIGKILL) if point else EXIT_STOPPED
        if set(attempt.codes) != {wanted}:
            where = f"killed at {point}" if point else "with time to save"
            result.problems.append(
                f"{number.name} to ranks {ranks}, {where}: {attempt.codes}: {tail(attempt.text)}"
            )
        elif point:
            cut += 1
        else:
            waited.append(max(at for _, at in attempt.job.ends.values()) - warned.sent_at)

    all_restarts[-1].finish()
    result.problems += problems_of(all_restarts)
    result.measured.append(
        f"{', '.join(number.name for number in GRACE_SIGNALS)} to one rank or all, from the signal "
        f"to 75: {spread(waited)}; the grace ended in a save {cut} times, and the same command "
        f"went on"
    )


def _next_step(restarts: Restarts, world: TinyRun) -> int | None:
    """A step after the newest checkpoint whose save is no regular one; None when none is left."""
    newest = restarts.attempts[-1].after if restarts.attempts else 0
    chunk = world.steps_per_chunk
    step = (max(newest, 0) // chunk + 1) * chunk + 1
    return step if step < world.steps - chunk else None


class Warned:
    """Send a signal while a rank is held at the end of a step; then SIGKILL in the save, if any."""

    def __init__(
        self, server: ForkServer, number: signal.Signals, ranks: Sequence[int], point: str
    ):
        self.server, self.number, self.ranks, self.point = server, number, ranks, point
        self.sent_at = 0.0

    def faults(self, step: int) -> str:
        """Hold rank 0 after that step, and in the save after it or the next one."""
        held = [f"{self.point}@rank=0@step={s}:sleep=60" for s in (step, step + 1)]
        return ";".join(
            [f"step.done@rank=0@step={step}:sleep={HELD_SECONDS}", *(held if self.point else [])]
        )

    def __call__(self, job: Job) -> None:
        if not self._struck(job, "step.done"):
            return
        self.sent_at = time.monotonic()
        for rank in self.ranks:
            job.send(rank, self.number)
        if self.point and self._struck(job, self.point):
            for rank in range(len(job.pids)):
                job.send(rank, signal.SIGKILL)

    def _struck(self, job: Job, point: str) -> bool:
        deadline = time.monotonic() + WAIT_SECONDS
        while not any(name.startswith(f"{point}:") for _, _, name in job.strikes()):
            if job.over or time.monotonic() > deadline:
                return False
            self.server.wait(job, 0.005)
        return True


def _through_launcher(bench: Bench, world: TinyRun, result: Result, number: signal.Signals) -> None:
    """The real command line: a signal to the launcher alone, then the same command to the end."""
    name = bench.name("launched")
    process = launch(world, name, "step.done@nth=5:sleep=1")
    wanted = world.run(name) / "checkpoints" / "ckpt_001" / "manifest.json"
    deadline = time.monotonic() + LIMIT_SECONDS
    while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(number)
    _, output = process.communicate(timeout=LIMIT_SECONDS)
    seconds = time.monotonic() - began
    if process.returncode != EXIT_STOPPED:
        result.problems.append(
            f"the launcher ended with {process.returncode} after {number.name}: {output[-300:]}"
        )
        return

    result.measured.append(f"launcher: {number.name} to 75 in {seconds:.1f} s")
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
        faults = faults[:: 3 if bench.short else 1 if world.ranks == 2 else 3]
        all_restarts = chain(bench, world, "row9", faults)
        made += struck_of(result, all_restarts, faults)
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
