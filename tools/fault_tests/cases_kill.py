"""Fault rows 1 to 3: SIGKILL in a step, in every phase of a save, in retention and rollback."""

import random
import signal
import time
from collections import Counter

from fault_tests.cases_memory import memory_kills
from fault_tests.cases_power import power_cuts
from fault_tests.processes import ForkServer, Job
from fault_tests.restarts import Attempt, Restarts
from fault_tests.result import (
    Bench,
    Result,
    allowed_seconds,
    attempts_of,
    chain,
    names_rank,
    problems_of,
    spread,
)
from fault_tests.tiny_run import TinyRun
from k2train.fault_injection import POINTS

GONE_SECONDS = 5.0
RANK_ZERO = ("start.locked", "start.aside")
"""Only rank 0 reaches these, and those that begin with `retire.` or `ledger.`"""


def ranks_at(point: str, ranks: int) -> list[int]:
    """Ranks that reach a fault point."""
    alone = point in RANK_ZERO or point.startswith(("retire.", "ledger."))
    return [0] if alone else list(range(ranks))


def kills(
    points: list[str], ranks: int, times: tuple[int, ...], every_rank: bool = True
) -> list[str]:
    """One SIGKILL for each point, each visit, and each rank that reaches it (or: ranks in turn)."""
    found = []
    for nth in times:
        for index, point in enumerate(points):
            there = ranks_at(point, ranks)
            chosen = there if every_rank else [there[index % len(there)]]
            found += [f"{point}@rank={rank}@nth={nth}:kill" for rank in chosen]
    return found


def not_struck(attempts: list[Attempt], expected: list[str]) -> list[str]:
    """Expected faults that did not fire, armed or not; a table of kills must not count them."""
    return sorted(set(expected) - {attempt.faults for attempt in attempts if attempt.struck})


def report(result: Result, all_restarts: list[Restarts], expected: list[str]) -> list[Attempt]:
    """Report the common figures of kill rows; returns the attempts in which a kill fired."""
    attempts = attempts_of(all_restarts)
    struck = [attempt for attempt in attempts if attempt.struck and attempt.faults]
    result.problems += problems_of(all_restarts)
    missed = not_struck(attempts, expected)
    if missed:
        result.missing.append(
            f"{len(missed)} of {len(expected)} places were not reached: {', '.join(missed)}"
        )

    runs = [restarts for restarts in all_restarts if restarts.done]
    fewest = [
        restarts.fewest_whole for restarts in all_restarts if restarts.fewest_whole is not None
    ]
    result.measured.append(
        f"{len(struck)} kills in {len(all_restarts)} runs; {len(runs)} runs ended with every loss, "
        f"gradient norm and state root equal to the undisturbed run's"
    )
    if fewest:
        result.measured.append(
            f"fewest complete verified checkpoints after a kill, once there were two: {min(fewest)}"
        )

    return struck


def row_1(bench: Bench) -> Result:
    """Row 1: SIGKILL in the middle of a step."""
    result = Result(
        1,
        "SIGKILL to a rank in the middle of a step",
        f"all ranks gone in {GONE_SECONDS:.0f} s, the dead rank named; same command goes on; same "
        "bits; at most one save interval lost",
        "every step point, every rank, steps drawn; 2 ranks (data) and 4 (tensor x pipeline); and "
        "the kernel's SIGKILL when the ranks' cgroup meets its memory limit, in steps and saves",
    )

    points = [point for point in POINTS if point.startswith("step.")]
    draw = bench.random(1)
    struck: list[Attempt] = []

    for grid in grids(bench, chunks=8, steps_per_chunk=3):
        visits = (1,) if bench.short or grid.ranks > 2 else (1, 2)
        wanted = kills(points, grid.ranks, visits, every_rank=not bench.short)
        wanted = [fault.replace("nth=1:", f"nth={draw.choice((4, 5, 6))}:") for fault in wanted]
        all_restarts = chain(bench, grid, f"row1_{grid.ranks}", wanted)
        struck += report(result, all_restarts, wanted)

    struck += memory_kills(bench, result)
    judge_ends(result, struck)
    return result


def grids(bench: Bench, chunks: int, steps_per_chunk: int) -> list[TinyRun]:
    """The worlds of the kill rows."""
    world = bench.world(chunks, steps_per_chunk)
    return [world] if bench.short else [world, world.on(4, tensor=2, pipeline=2)]


def judge_ends(result: Result, struck: list[Attempt]) -> None:
    """Measure the time until all ranks ended and the cost of a restart.

    Check that the dead is named.
    """
    ended = [attempt for attempt in struck if not attempt.helped]
    gone = [attempt.gone_seconds for attempt in ended]
    result.measured.append(f"from the kill to the last rank's end: {spread(gone)}")
    limit = allowed_seconds(GONE_SECONDS, struck)
    late = [attempt for attempt in ended if attempt.gone_seconds > limit]
    result.problems += [
        f"{a.faults}: the last rank ended {a.gone_seconds:.1f} s after the kill" for a in late
    ]
    named = sum(
        names_rank(a.text, a.codes.index(-signal.SIGKILL))
        for a in struck
        if -signal.SIGKILL in a.codes
    )
    result.measured.append(
        f"the survivors' message named the dead rank in {named} of {len(struck)}"
    )

    if named < len(struck):
        unnamed = next(a for a in struck if not names_rank(a.text, a.codes.index(-signal.SIGKILL)))
        result.problems.append(
            f"dead rank not named in {len(struck) - named} of {len(struck)}, e.g. "
            f"{unnamed.faults}: {tail(unnamed.text)}"
        )

    starts = [seconds for a in struck if (seconds := a.first_step_seconds) is not None]
    result.measured.append(
        f"from the start of an attempt to its first finished step: {spread(starts)}"
    )


def tail(text: str) -> str:
    """The end of a text on one line."""
    return " | ".join(line for line in text.splitlines() if " chunk " not in line)[-300:]


def row_2(bench: Bench) -> Result:
    """Row 2: SIGKILL in every phase of a save."""
    result = Result(
        2,
        "SIGKILL and power loss at every phase of a save",
        "no attempt ever loads a wrong or unfinished checkpoint; the newest whole one is the last "
        "or the one before; after a power loss all that was recorded is there; same bits",
        "every save point and ledger line, every rank that comes there, first to third save; "
        "SIGKILLs at random times while a save is under way, to one rank or all; and power cuts "
        "at the same points and at random times, on an ext4 image that is shut down without a "
        "flush, so that all that was not synced is lost (the cache of a drive counts as written)",
    )

    points = [point for point in POINTS if point.startswith(("save.", "ledger."))]
    for grid in grids(bench, chunks=12, steps_per_chunk=2):
        visits = (2,) if bench.short or grid.ranks > 2 else (1, 2, 3)
        wanted = kills(points, grid.ranks, visits, every_rank=not bench.short)
        wanted += kills(["end"], grid.ranks, (1,), every_rank=not bench.short)
        report(result, chain(bench, grid, f"row2_{grid.ranks}", wanted), wanted)

    random_kills(bench, result)
    power_cuts(bench, result)
    return result


def random_kills(bench: Bench, result: Result) -> None:
    """SIGKILL at random moments of a save; the trace shows the phase."""
    draw = bench.random(2)
    world = bench.world(12, 2)
    bench.reference(world)
    where: Counter[str] = Counter()
    all_restarts = [bench.restarts(world, "random")]

    for number in range(bench.kills):
        if bench.time_is_up:
            result.missing.append(f"{bench.kills - number} random kills: the time was up")
            break
        if all_restarts[-1].done:
            all_restarts[-1].finish()
            all_restarts.append(bench.restarts(world, "random"))
        strike = RandomKill(bench.server, draw)
        attempt = all_restarts[-1].attempt("", strike)
        if attempt.struck:
            where[strike.last_point(attempt.job)] += 1
        if number % 20 == 19:
            bench.log(f"random kills: {number + 1} of {bench.kills}")

    all_restarts[-1].finish()
    result.problems += problems_of(all_restarts)
    places = ", ".join(f"{place} {count}" for place, count in sorted(where.items()))
    result.measured.append(
        f"{sum(where.values())} SIGKILLs at random times in {len(all_restarts)} runs, none left a "
        f"checkpoint that was wrong; last point passed before the kill: {places}"
    )


class RandomKill:
    """Wait for a save to begin, then for a random part of a save's duration, and kill."""

    def __init__(self, server: ForkServer, draw: random.Random):
        self.server = server
        self.save = draw.choice((1, 2, 3))
        self.part = draw.random()
        self.victims = draw.choice(((0,), (1,), (0, 1)))
        self.at = 0.0

    def __call__(self, job: Job) -> None:
        begun = self._begun(job)
        if begun is None:
            return
        time.sleep(self.part * 0.15)
        self.at = time.monotonic()
        for rank in self.victims:
            job.send(rank, signal.SIGKILL)

    def _begun(self, job: Job) -> float | None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not job.over:
            times = [
                at
                for at, rank, name in job.points()
                if name in ("save.begin", "save.snapshot") and rank == 0
            ]
            if len(times) >= self.save:
                return times[-1]
            self.server.poll()
            time.sleep(0.003)

        return None

    def last_point(self, job: Job) -> str:
        """The last point of saving or recording that a victim came to, of both its threads."""
        mine = [name for _, rank, name in job.points() if rank in self.victims]
        return next(
            (name for name in reversed(mine) if name.startswith(("save.", "retire.", "ledger."))),
            "nowhere",
        )


def row_3(bench: Bench) -> Result:
    """Row 3: SIGKILL during retention and rollback."""
    result = Result(
        3,
        "SIGKILL while old checkpoints are removed, or later ones set aside for a rollback",
        "at every moment two complete verified checkpoints lie on the disk (one at the very "
        "start); same bits",
        "every retire point at its first to fourth visit; a rollback to a numbered checkpoint, "
        "killed while it sets aside",
    )

    points = [point for point in POINTS if point.startswith("retire.")]
    world = bench.world(12, 2).changed(
        ("checkpoint.keep_optimizer_states", 2), ("checkpoint.every_seconds", 0.001)
    )
    wanted = kills(points, world.ranks, (1, 2) if bench.short else (1, 2, 3, 4))
    all_restarts = chain(bench, world, "row3", wanted)
    report(result, all_restarts, wanted)
    rollback(bench, result, world)
    return result


def rollback(bench: Bench, result: Result, world: TinyRun) -> None:
    """Roll back to the last checkpoint but one, killed at `start.aside`.

    Then again, and to the end.
    """
    restarts = bench.restarts(world, "rollback")
    restarts.attempt("step.read@step=13:kill")
    whole = [int(name.rpartition("_")[2]) for name in _complete(restarts)]
    if len(whole) < 2:
        result.missing.append("a rollback: fewer than two checkpoints were there to go back to")
        return

    back = f"run.resume={whole[-2]}"
    killed = restarts.attempt("start.aside@nth=1:kill", None, (1, 75, -9), 240.0, back)
    if not killed.struck:
        result.missing.append("the kill at start.aside struck nobody")
    restarts.attempt("", None, (1, 75), 240.0, back)
    restarts.finish()
    result.problems += restarts.problems
    result.measured.append(
        f"rollback from checkpoint {whole[-1]} to {whole[-2]}, killed while setting aside, then "
        f"done: {len(restarts.attempts)} attempts"
    )


def _complete(restarts: Restarts) -> list[str]:
    folder = restarts.run / "checkpoints"
    return sorted(
        p.name
        for p in folder.glob("ckpt_???")
        if (p / "optimizer").is_dir() and not (p / "thinned.json").exists()
    )
