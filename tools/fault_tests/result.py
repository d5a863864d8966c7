"""Fault row results, and the bench that rows share: server, scratch folder, seed and effort."""

import math
import random
import re
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fault_tests.disk_state import Reference
from fault_tests.processes import ROOT, ForkServer, Job
from fault_tests.restarts import Attempt, Restarts, slowdown, undisturbed
from fault_tests.tiny_run import TinyRun, make_tiny_run

SHORT, MEDIUM = "short", "medium"
HANG_SECONDS = 20.0
"""From a hang to the last rank's end: twice the time to notice one."""


@dataclass
class Result:
    """Result of one row.

    `problems` decide it; `measured` is for readers; `missing` is what did not run.
    """

    row: int
    fault: str
    target: str
    how: str
    measured: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seen: str = ""
    """When, and on which commit, where the row comes from the record of an earlier run."""

    @property
    def seed(self) -> int:
        """Seed of a row from the record of an earlier run; 0 for one of this run."""
        found = re.search(r"\bseed (\d+)$", self.seen)
        return int(found[1]) if found else 0

    @property
    def verdict(self) -> str:
        """Whether the row held, held in part, or did not hold."""
        if self.problems:
            return "NOT HELD"
        if not self.measured:
            return "not run"
        return "held in part" if self.missing else "held"


@dataclass
class Bench:
    """Resources and settings of a row."""

    server: ForkServer
    scratch: Path
    level: str = MEDIUM
    seed: int = 1
    kills: int = 40
    endurance: int = 100
    log: Callable[[str], None] = lambda text: None
    keep: Callable[[Result], object] = lambda result: None
    """Writes down what a long row has come to so far."""
    until: float = math.inf
    """CLOCK_MONOTONIC at which rows shall come to an end."""
    _worlds: dict[tuple[int, ...], TinyRun] = field(default_factory=dict)
    _references: dict[TinyRun, Reference] = field(default_factory=dict)
    _names: int = 0

    @property
    def short(self) -> bool:
        """True at the short level."""
        return self.level == SHORT

    @property
    def time_is_up(self) -> bool:
        """True when a row that repeats faults shall stop and report."""
        return time.monotonic() >= self.until

    def random(self, row: int) -> random.Random:
        """Random numbers that depend on the seed and the row alone."""
        return random.Random(self.seed * 1000 + row)

    def world(self, chunks: int, steps_per_chunk: int, held_out: bool = False) -> TinyRun:
        """A world of that size, created once."""
        key = (chunks, steps_per_chunk, int(held_out))
        if key not in self._worlds:
            folder = self.scratch / f"world_{chunks}_{steps_per_chunk}_{int(held_out)}"
            self._worlds[key] = make_tiny_run(folder, chunks, steps_per_chunk, held_out=held_out)
        return self._worlds[key]

    def name(self, stem: str) -> str:
        """A new run name with that stem."""
        self._names += 1
        return f"{stem}_{self._names}"

    def reference(self, world: TinyRun) -> Reference:
        """The undisturbed run of a world on its grid, done once."""
        if world not in self._references:
            self._references[world] = undisturbed(self.server, world, self.name("undisturbed"))
        return self._references[world]

    def restarts(self, world: TinyRun, stem: str) -> Restarts:
        """A new restart chain of a world."""
        return Restarts(self.server, world, self.name(stem), self.reference(world))


def chain(
    bench: Bench, world: TinyRun, stem: str, faults: Iterable[str], again: int = 2
) -> list[Restarts]:
    """Run one attempt per fault, on new runs as the old ones finish.

    Finish the last without faults.

    A fault whose point was not reached because the run was done is tried once more on a new run.
    """
    made = [bench.restarts(world, stem)]
    for fault in faults:
        if bench.time_is_up:
            break
        for _ in range(again):
            if made[-1].done:
                made[-1].finish()
                made.append(bench.restarts(world, stem))
            attempt = made[-1].attempt(fault)
            if attempt.struck or not made[-1].done:
                break
        bench.log(f"{stem}: {fault}: {attempt.codes}")

    made[-1].finish()
    return made


def attempts_of(all_restarts: Sequence[Restarts]) -> list[Attempt]:
    """All attempts of several restart chains."""
    return [attempt for restarts in all_restarts for attempt in restarts.attempts]


def problems_of(all_restarts: Sequence[Restarts]) -> list[str]:
    """All problems of several restart chains."""
    return [problem for restarts in all_restarts for problem in restarts.problems]


def allowed_seconds(promised: float, attempts: Iterable[Attempt | Job]) -> float:
    """The seconds promised on an idle machine, scaled to this one.

    Longer by as much as the starts of `attempts` were slower than on an idle machine.
    """
    return promised * slowdown(attempts)


def spread(values: Sequence[float], unit: str = "s") -> str:
    """Median and largest value as text."""
    if not values:
        return "none"
    return (
        f"median {statistics.median(values):.2f} {unit}, at most {max(values):.2f} {unit} "
        f"({len(values)})"
    )


def run_pytest(
    result: Result, nodes: Sequence[str], scratch: Path, what: str, limit: float = 900
) -> None:
    """Prove a row by tests of the suite; their outcome and seconds go into the result."""
    absent = [node for node in nodes if not (ROOT / node.partition("::")[0]).exists()]
    if absent:
        result.missing.append(f"{', '.join(absent)} does not exist")
    present = [node for node in nodes if node not in absent]
    if not present:
        return
    report = scratch / f"row_{result.row}.xml"

    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *present,
    ]

    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        result.problems.append(f"{' '.join(present)} was not done after {limit:.0f} s")
        return

    if not report.exists():
        result.problems.append(
            f"pytest {' '.join(present)} ended with {done.returncode}: {done.stdout[-300:]}"
        )
        return

    suite = next(xml.parse(report).getroot().iter("testsuite"))
    count = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    bad = [
        case.get("name", "") for case in suite.iter("testcase") if case.find("failure") is not None
    ]
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    if count["failures"] or count["errors"] or not passed:
        result.problems.append(f"{what}: {count} {', '.join(bad[:5])}")
    if passed:
        result.measured.append(
            f"{what}: {passed} tests pass in {time.monotonic() - began:.0f} s "
            f"({', '.join(present)})"
        )

    if count["skipped"]:
        result.missing.append(f"{count['skipped']} of the tests were skipped")


def names_rank(text: str, rank: int) -> bool:
    """True when a message names that rank and a step or phase."""
    return (
        re.search(rf"\brank {rank}\b[^\n]*\b(died|stuck|stopped|slow|damaged)\b", text) is not None
    )
