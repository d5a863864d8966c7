"""Power loss while a run saves, steps or writes its ledger: the second part of fault row 2.

- The run's folder is an ext4 file system of its own. A cut drops all that was not synced; then all
  ranks are killed, the journal is recovered, and the same command goes on.
- The ranks trace what the ledger has acknowledged, so the judge knows what had to survive.
- Some cuts strike at a fault point, in the rank that reaches it; others at random times.
"""

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fault_tests.cases_disk import tool_says
from fault_tests.code_patches import ACKNOWLEDGED, CUT
from fault_tests.mounted_disk import MountedDisk, cut_power
from fault_tests.processes import ForkServer, Job
from fault_tests.restarts import Attempt, Restarts, forget
from fault_tests.result import Bench, Result
from fault_tests.tiny_run import TinyRun
from k2train.checkpoint.verify import verify_checkpoint
from k2train.errors import CheckpointError, RunError
from k2train.fault_injection import POINTS
from k2train.record.ledger import read_ledger
from k2train.record.metrics import read_metrics
from k2train.train.ledger_check import ledger_heads

MOMENTS = {
    "a save": (("save.begin", "save.snapshot"), 0.15),
    "steps": (("step.read", "step.done"), 0.1),
    "a line of the ledger": (("ledger.append",), 0.01),
}
"""What is under way -> points of rank 0 that begin it, and about how many seconds it takes."""
OFTEN = (("checkpoint.keep_optimizer_states", 2), ("checkpoint.every_seconds", 0.001))
"""So that every point of retention is reached: a save in each step, and few are kept."""
WAIT_SECONDS = 60.0
POLL_SECONDS = 0.003
STRIKE = "power:cut"


def power_points() -> list[str]:
    """Fault points around each write that must be durable."""
    return [point for point in POINTS if point.startswith(("save.", "retire.", "ledger."))]


@dataclass
class RandomCut:
    """Cut the power at a random time of a save, of steps, or of a ledger line."""

    server: ForkServer
    disk: MountedDisk
    moment: str
    visit: int
    part: float
    at: float | None = None
    """CLOCK_MONOTONIC just before the cut; None: the attempt was over before."""

    @classmethod
    def drawn(cls, server: ForkServer, disk: MountedDisk, draw: random.Random) -> "RandomCut":
        """A cut that depends on the random numbers alone."""
        moment = draw.choice(sorted(MOMENTS))
        return cls(server, disk, moment, draw.choice((1, 2, 3, 4)), draw.random())

    @property
    def environment(self) -> dict[str, str]:
        """What the ranks get."""
        return {}

    def __call__(self, job: Job) -> None:
        points, seconds = MOMENTS[self.moment]
        deadline = time.monotonic() + WAIT_SECONDS
        while sum(r == 0 and name in points for _, r, name in job.points()) < self.visit:
            if time.monotonic() > deadline or job.over:
                return
            self.server.wait(job, POLL_SECONDS)

        self.server.wait(job, self.part * seconds)
        if job.over:
            return
        self.at = time.monotonic()
        cut_power(self.disk.folder)
        for rank in range(len(job.pids)):
            job.send(rank, signal.SIGKILL)
        self.server.wait(job, WAIT_SECONDS)


@dataclass
class PointCut:
    """Cut the power where a rank comes to a fault point."""

    server: ForkServer
    disk: MountedDisk
    point: str
    visit: int
    rank: int = 0
    at: float | None = None
    """As of `RandomCut`."""

    @property
    def moment(self) -> str:
        """What is counted."""
        return self.point

    @property
    def environment(self) -> dict[str, str]:
        """What the ranks get."""
        return {CUT: f"{self.point} {self.visit} {self.rank} {self.disk.folder}"}

    def __call__(self, job: Job) -> None:
        self.server.wait(job, WAIT_SECONDS)
        self.at = next((at for at, _, name in job.strikes() if name == STRIKE), None)


@dataclass
class PowerRun:
    """One run on the disk: attempts that end by a cut, and what must have survived each."""

    restarts: Restarts
    disk: MountedDisk
    events: int = 0
    """Ledger events that were acknowledged so far."""
    saved: list[str] = field(default_factory=list)
    """Checkpoints whose ledger event was acknowledged, oldest first."""
    rows_lost: list[int] = field(default_factory=list)
    """Rows of metrics that each cut cost."""

    def attempt(self, cut: RandomCut | PointCut) -> bool:
        """Run until the cut, mount again and judge; whether the cut came."""
        patch = self.restarts.environments
        self.restarts.environments = [{**own, **cut.environment} for own in patch]

        def during(job: Job) -> None:
            cut(job)
            if cut.at is not None:
                self.disk.remount()

        made = self.restarts.attempt("", during)
        self.restarts.environments = patch
        self._remember(made, cut.at)
        if cut.at is None:
            return False

        label = f"{self.restarts.name}, attempt {len(self.restarts.attempts)}, power cut in "
        self.restarts.problems += [
            f"{label}{cut.moment}: {what}" for what in self._problems(made, cut.at)
        ]
        return True

    def finish(self) -> None:
        """Go on undisturbed to the end; the run must be whole for the verify tool as well."""
        self.restarts.finish()
        code, output = tool_says("verify_run", [str(self.restarts.run), "--data"])
        if code != 0:
            self.restarts.problems.append(f"{self.restarts.name}: verify_run: {output[-300:]}")

    def _remember(self, made: Attempt, at: float | None) -> None:
        """Note what the ledger has acknowledged; what came after the cut does not count."""
        for time_, _, name in made.job.points():
            if name.startswith(ACKNOWLEDGED) and (at is None or time_ < at):
                seq, _, checkpoint = name.removeprefix(ACKNOWLEDGED).partition(":")
                self.events = max(self.events, int(seq) + 1)
                self.saved += [checkpoint] if checkpoint else []

    def _problems(self, made: Attempt, at: float) -> list[str]:
        run = self.restarts.run
        try:
            found = [self.disk.control_problem(), *self._ledger_problems(run)]
            found += self._checkpoint_problems(run)
            found += self._row_problems(run, made, at)
        except (RunError, CheckpointError) as error:
            found = [str(error)]
        return [problem for problem in found if problem]

    def _ledger_problems(self, run: Path) -> list[str]:
        """Every acknowledged event is there, and every event that a head names."""
        ledger = run / "ledger.jsonl"
        events = len(read_ledger(ledger)) if ledger.exists() else 0
        wanted = {"what was acknowledged": self.events}
        wanted |= {source: head.events for source, head in ledger_heads(ledger).items()}
        return [
            f"the ledger has {events} events, {source}: {count}"
            for source, count in wanted.items()
            if count > events
        ]

    def _checkpoint_problems(self, run: Path) -> list[str]:
        """Every recorded checkpoint is there and verifies, thinned ones too.

        Those between two ends of a chunk are removed in time, but never the newest.
        """
        found = []
        for name in sorted({n for n in self.saved if "_step_" not in n} | {*self.saved[-1:]}):
            path = run / "checkpoints" / name
            if not path.is_dir():
                found.append(f"{name} was saved and is gone")
                continue
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                found.append(f"{name} was saved and is not whole: {error}")
        return found

    def _row_problems(self, run: Path, made: Attempt, at: float) -> list[str]:
        """Rows may be lost, but only those of steps after the newest checkpoint."""
        metrics = run / "metrics.jsonl"
        rows = read_metrics(metrics) if metrics.exists() else []
        taken = sum(t < at and r == 0 and name == "step.done" for t, r, name in made.job.points())
        here = sum(row.attempt == len(self.restarts.attempts) for row in rows)
        self.rows_lost.append(max(0, taken - here))

        missing = sorted(set(range(1, made.after + 1)) - {row.step for row in rows})
        return [
            f"step {step} has no row, the newest checkpoint is of step {made.after}"
            for step in missing[:1]
        ]


def power_cuts(bench: Bench, result: Result) -> None:
    """Cut the power at each point once, and at random times."""
    with MountedDisk(bench.scratch / "power") as disk:
        if disk.problem:
            result.missing.append(f"power loss: {disk.problem}")
            return

        base = bench.world(12, 2).changed(*OFTEN)
        world, reference = world_on(disk, base), bench.reference(base)

        def new_run() -> PowerRun:
            patch = [{"FAULT_RUN_PATCH": "code_patches:power_cut"}] * world.ranks
            name = bench.name("power")
            return PowerRun(
                Restarts(bench.server, world, name, reference, environments=patch), disk
            )

        _cut_all(bench, result, cuts_of(bench, disk), new_run)


def cuts_of(bench: Bench, disk: MountedDisk) -> list[RandomCut | PointCut]:
    """All cuts: one at each point, then half as many random ones as `--kills`."""
    draw = bench.random(102)
    points = power_points()[:: 6 if bench.short else 1]
    count = max(1, bench.kills // 2)
    return [
        *(PointCut(bench.server, disk, point, draw.choice((1, 2, 3))) for point in points),
        *(RandomCut.drawn(bench.server, disk, draw) for _ in range(count)),
    ]


def world_on(disk: MountedDisk, base: TinyRun) -> TinyRun:
    """A copy of a tiny run on the disk, synced."""
    world = replace(base, folder=disk.folder / "world")
    shutil.copytree(base.data, world.data)
    world.config.write_text(base.config.read_text().replace(str(base.folder), str(world.folder)))
    disk.remount()
    return world


def _cut_all(
    bench: Bench,
    result: Result,
    cuts: list[RandomCut | PointCut],
    new_run: Callable[[], PowerRun],
) -> None:
    """Run attempts until every cut has come; a new run when one is done."""
    runs, where, never = [new_run()], Counter[str](), list[str]()

    for number, cut in enumerate(cuts):
        if bench.time_is_up:
            result.missing.append(f"{len(cuts) - number} power cuts: the time was up")
            break
        for _ in range(2):
            if runs[-1].restarts.done:
                runs[-1].finish()
                forget(runs[-1].restarts)
            if runs[-1].restarts.done or runs[-1].restarts.problems:
                # What a cut has broken would fail every later attempt, too.
                runs.append(new_run())
            if runs[-1].attempt(cut):
                where[cut.moment] += 1
                break
        else:
            never.append(cut.moment)
        if number % 10 == 9:
            bench.log(f"power cuts: {number + 1} of {len(cuts)}")

    if not runs[-1].restarts.problems:
        runs[-1].finish()
    _report(result, runs, where, never)


def _report(
    result: Result, runs: list[PowerRun], where: Counter[str], never: Sequence[str]
) -> None:
    problems = [problem for run in runs for problem in run.restarts.problems]
    result.problems += problems
    if never:
        result.missing.append(f"{len(never)} power cuts did not come: {', '.join(never)}")

    places = ", ".join(f"{place} {count}" for place, count in sorted(where.items()))
    result.measured.append(
        f"{sum(where.values())} power cuts on ext4 in {len(runs)} runs, of which "
        f"{sum(run.restarts.done for run in runs)} came to their end; cut in: {places}"
    )
    if problems:
        return

    lost = [rows for run in runs for rows in run.rows_lost]
    result.measured.append(
        "each cut dropped a file that was not synced; each recorded checkpoint verified after it, "
        "each acknowledged event was in the ledger, all runs ended with the undisturbed bits; rows "
        f"of metrics lost: {sum(lost)} in all, at most {max(lost, default=0)} at once, none of a "
        "step before the newest checkpoint"
    )
