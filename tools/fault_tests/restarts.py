"""Restart chains: one run, attempt after attempt with new faults, checked completely after each.

- After each attempt the newest checkpoints and every row of the metrics are compared with the
  undisturbed run. So a failure is still pinned to its attempt.

Alternatives considered:
- A new run per fault: then the states that faults leave on the disk never meet each other, as they
  do in a long job.
"""

import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fault_tests import disk_state
from fault_tests.disk_state import Reference
from fault_tests.processes import ForkServer, Job
from fault_tests.tiny_run import TinyRun
from k2train.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE

LIMIT_SECONDS = 240.0
GRACE_SECONDS = 15.0
"""How long ranks have to end by themselves after one of them has died, before the launcher's
turn.
"""
IDLE_START_SECONDS = 1.0
"""More than a warm start takes to its first step on an idle machine: 0.3 s."""
RECENT = 20
"""Attempts that say how busy the machine is now."""
LEFT_SECONDS = 2.0
GOING_ON = (
    EXIT_FAILED,
    EXIT_STOPPED,
    -int(signal.SIGKILL),
    -int(signal.SIGTERM),
    -int(signal.SIGABRT),
    -int(signal.SIGSEGV),
)


@dataclass
class Attempt:
    """Observations of one attempt."""

    faults: str
    job: Job
    text: str
    before: int
    """Step of the newest checkpoint before it, and after; -1 for none."""
    after: int
    helped: str = ""
    """What its launcher had to do to end it."""

    @property
    def codes(self) -> list[int]:
        """Exit codes by rank."""
        return self.job.codes

    @property
    def struck(self) -> bool:
        """True when any process died of a signal of its own."""
        return any(code < 0 for code in self.codes)

    @property
    def seconds(self) -> float:
        """Duration of the attempt."""
        return max(at for _, at in self.job.ends.values()) - self.job.began

    @property
    def refused(self) -> bool:
        """True when the start was refused as a user error.

        The launcher may have ended other ranks, by a signal that is no request during a start.
        """
        ended = {-int(signal.SIGTERM), EXIT_FAILED} if self.helped else {-int(signal.SIGTERM)}
        return EXIT_USAGE in self.codes and set(self.codes) <= {EXIT_USAGE, *ended}

    @property
    def gone_seconds(self) -> float:
        """Seconds from the first end of a rank to the last."""
        return self.job.spread_seconds

    @property
    def first_step_seconds(self) -> float | None:
        """Seconds from the start to the end of the first step."""
        return self.first_point_seconds("step.done")

    def first_point_seconds(self, point: str) -> float | None:
        """Seconds from the start until a rank first reached a fault point; None if none did."""
        return self.job.first_point_seconds(point)


@dataclass
class Restarts:
    """A run under faults. The run survived when `problems` is empty at the end."""

    server: ForkServer
    world: TinyRun
    name: str
    reference: Reference
    attempts: list[Attempt] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    fewest_whole: int | None = None
    """The fewest complete verified checkpoints seen between two attempts, once there were two."""
    verify_newest: int = 0
    environments: Sequence[Mapping[str, str]] = ()
    """What each rank gets besides; empty: nothing."""
    harmed: set[str] = field(default_factory=set)
    """Checkpoints harmed from outside that no start has set aside yet."""
    harmed_unread: set[str] = field(default_factory=set)
    """Those harmed in a file that no load reads: only a later look at them can find it."""
    _had_two: bool = False

    @property
    def run(self) -> Path:
        """Directory of the run."""
        return self.world.run(self.name)

    @property
    def done(self) -> bool:
        """True when the run has finished."""
        return bool(self.attempts) and set(self.attempts[-1].codes) == {EXIT_DONE}

    def attempt(
        self,
        faults: str = "",
        during: Callable[[Job], object] | None = None,
        allowed: tuple[int, ...] = GOING_ON,
        limit: float = LIMIT_SECONDS,
        *more: str,
    ) -> Attempt:
        """Start the command with damage by `during`, wait for its end, and check everything."""
        before = max(disk_state.newest_step(self.run), -1)
        job = self.server.begin(
            self.world.arguments(self.name, *more), self.world.ranks, faults, self.environments
        )
        if during is not None:
            during(job)
        label = f"{self.name}, attempt {len(self.attempts) + 1} ({faults or 'no fault'})"
        grace = GRACE_SECONDS * slowdown(self.attempts[-RECENT:])
        helped = self.server.wait_as_launcher(job, limit, grace)
        met = {rank for _, rank, name in job.points() if name == "start.agreed"}
        # When all others are dead, only a launcher can end a stopped rank.
        stopped = {rank for _, rank, name in job.strikes() if name.endswith(":stop")}
        if helped and len(met) == len(job.pids) and not set(job.late) <= stopped:
            self.problems.append(f"{label}: {helped}; {job.text()[-300:]}")
        made = Attempt(faults, job, job.text(), before, disk_state.newest_step(self.run), helped)
        self.attempts.append(made)
        self.problems += [f"{label}: {what}" for what in self._look(made, allowed)]
        return made

    def attempt_with(
        self,
        environments: Sequence[Mapping[str, str]],
        during: Callable[[Job], object] | None = None,
    ) -> Attempt:
        """An attempt whose ranks get environment variables of their own."""
        kept, self.environments = self.environments, environments
        try:
            return self.attempt("", during)
        finally:
            self.environments = kept

    def expect_fewer(self, harmed: str = "", is_read: bool = True) -> None:
        """Allow one complete checkpoint fewer after the next attempt: one was damaged from outside.

        `harmed` may be damaged until a start has advanced far enough to set it aside, and without
        end if a load does not read what was damaged (`is_read`).
        """
        self._had_two = False
        if harmed:
            (self.harmed if is_read else self.harmed_unread).add(harmed)

    def unexpected(self, problems: Sequence[str]) -> list[str]:
        """What of the problems of checkpoints was not done to them from outside."""
        expected = self.harmed | self.harmed_unread
        return [text for text in problems if not any(f"{name}: " in text for name in expected)]

    def finish(self, tries: int = 5) -> None:
        """Start without faults until the run is done, then compare its whole record."""
        for _ in range(tries):
            if self.done:
                break
            # Up to all steps at once, as the undisturbed run takes them.
            self.attempt(limit=4 * LIMIT_SECONDS)
        if not self.done:
            self.problems.append(
                f"{self.name}: not done after {tries} undisturbed starts; last said: "
                f"{self.attempts[-1].text[-300:]}"
            )
            return
        self.problems += [f"{self.name}: {what}" for what in self.end_problems()]

    def end_problems(self) -> list[str]:
        """What is wrong with a finished run."""
        disk = disk_state.checkpoints_of(self.run, self.reference)
        found = self.unexpected(disk.problems)
        found += disk_state.row_problems(self.run, self.reference, done=True)
        found += disk_state.sample_problems(self.run, self.world)
        if not disk.whole or disk.whole[-1] != self.reference.final:
            found.append(
                f"the newest whole checkpoint is {disk.whole[-1:]}, undisturbed "
                f"{self.reference.final}"
            )
        found += [f"{name} was left over" for name in disk_state.leftovers(self.run)]
        return found

    def _look(self, made: Attempt, allowed: tuple[int, ...]) -> list[str]:
        found = self.server.left_behind(made.job)
        if found:
            # A helper of a killed rank, such as git, ends by itself.
            time.sleep(LEFT_SECONDS)
            found = self.server.left_behind(made.job)
        asked = (-int(signal.SIGTERM),) if made.helped else ()
        wrong = [code for code in made.codes if code not in (EXIT_DONE, *allowed, *asked)]
        if wrong:
            lines = [line for line in made.text.splitlines() if "chunk" not in line]
            found.append(f"exit codes {made.codes}; said: {' | '.join(lines[-3:])[-400:]}")

        if disk_state.lock_held(self.run):
            found.append("the lock of the run is still held")
        disk = disk_state.checkpoints_of(self.run, self.reference, self.verify_newest)
        if any(name == "step.read" for _, _, name in made.job.points()):
            # Past the place where what is damaged is set aside.
            self.harmed.clear()

        found += self.unexpected(disk.problems)
        committed = sum(
            rank == 0 and name == "save.committed" for _, rank, name in made.job.points()
        )
        self._had_two |= committed >= 2

        if len(disk.whole) < (2 if self._had_two else 1) and (
            committed or max(made.before, made.after) >= 0
        ):
            found.append(
                f"only {len(disk.whole)} complete verified checkpoints are left: {disk.whole}"
            )

        self._had_two |= len(disk.whole) >= 2
        if self._had_two:
            self.fewest_whole = min(len(disk.whole), self.fewest_whole or len(disk.whole))
        return found + disk_state.row_problems(self.run, self.reference)


def slowdown(attempts: Iterable[Attempt | Job]) -> float:
    """How many times slower these attempts started than they do on an idle machine; at least 1."""
    firsts = [made.first_point_seconds("step.done") for made in attempts]
    starts = [seconds for seconds in firsts if seconds is not None]
    return max(1.0, statistics.median(starts or [0.0]) / IDLE_START_SECONDS)


def undisturbed(server: ForkServer, world: TinyRun, name: str = "undisturbed") -> Reference:
    """Run the world without faults.

    Raises RuntimeError when that fails: nothing can be compared then.
    """
    job = server.begin(world.arguments(name), world.ranks)
    server.wait(job, LIMIT_SECONDS * 4)
    if job.codes != [EXIT_DONE] * world.ranks:
        server.end(job)
        raise RuntimeError(f"the undisturbed run ended with {job.codes}: {job.text()[-1500:]}")
    return disk_state.reference_of(world.run(name))


def forget(restarts: Restarts) -> None:
    """Delete the files of a run that survived."""
    if not restarts.problems:
        shutil.rmtree(restarts.run, ignore_errors=True)
