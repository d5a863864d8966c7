"""Interleaved measurement: contenders of a group step one at a time, round after round.

- The order alternates between rounds.
- Every contender of a group stays alive, waiting in a read. A slow moment of the machine hits
  neighbours in a round, and cancels in their ratio.

Alternatives considered:
- One contender after the other: that compares the machine with itself.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.cpu.contenders import Contender
from benchmarks.cpu.processes import ContenderProcesses
from benchmarks.cpu.work import Work

Log = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Amount of measurement, and time limits.

    `measure` adds a last step under the memory profiler.
    """

    rounds: int = 4
    steps: int = 1
    warmup_steps: int = 1
    measure: bool = True
    cores: int = 2
    limit_seconds: float = 120.0
    start_limit_seconds: float = 600.0
    """For building and the first step, which may compile."""
    extra_path: str = ""
    """Additional module path of the workers: contenders of another folder."""


@dataclass
class Sample:
    """Measurements of one contender: `seconds` per step, one per round; None after it failed."""

    contender: Contender
    threads: int
    seconds: list[float | None] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    parameters: int | None = None
    note: str = ""
    runtime: dict[str, Any] | None = None
    """Libraries of its processes, as `serve.runtime_facts` has them; None from older commits."""
    peak_resident_bytes: int | None = None
    peak_step_bytes: int | None = None
    problem: str | None = None
    kind: str = ""


def run_group(contenders: Sequence[Contender], work: Work, plan: Plan, log: Log) -> list[Sample]:
    """Start, warm up, measure and end the contenders of one group.

    A problem ends in its contender's sample.
    """
    with _running(contenders, work, plan) as running:
        samples = [Sample(processes.contender, processes.threads) for processes in running]
        pairs = list(zip(running, samples, strict=True))
        for processes, sample in pairs:
            log(f"starting {processes.contender.name}")
            _started(processes, sample, plan)
        for processes, sample in pairs:
            log(f"warming up {processes.contender.name}")
            for number in range(plan.warmup_steps):
                _run(
                    processes, sample, 1, plan.limit_seconds if number else plan.start_limit_seconds
                )
        for number in range(plan.rounds):
            log(f"round {number + 1} of {plan.rounds}")
            for processes, sample in pairs if number % 2 == 0 else reversed(pairs):
                sample.seconds.append(_run(processes, sample, plan.steps, plan.limit_seconds))
        if plan.measure:
            for processes, sample in pairs:
                answers = processes.ask("measure", plan.limit_seconds) or []
                sample.peak_step_bytes = max(
                    (int(a["peak_step_bytes"]) for a in answers), default=None
                )
        for processes, sample in pairs:
            sample.problem, sample.kind = processes.problem, processes.kind
        return samples


@contextlib.contextmanager
def _running(
    contenders: Sequence[Contender], work: Work, plan: Plan
) -> Iterator[list[ContenderProcesses]]:
    running: list[ContenderProcesses] = []
    with TemporaryDirectory(prefix="k2train-bench-") as name:
        try:
            for number, contender in zip(itertools.count(), contenders):
                folder = Path(name) / str(number)
                running.append(
                    ContenderProcesses(contender, work, plan.cores, folder, plan.extra_path)
                )
            yield running
        finally:
            for processes in running:
                processes.end()


def _started(processes: ContenderProcesses, sample: Sample, plan: Plan) -> None:
    answers = processes.ask(None, plan.start_limit_seconds)
    if answers:
        sample.parameters, sample.note = int(answers[0]["parameters"]), str(answers[0]["note"])
        sample.runtime = answers[0].get("runtime")


def _run(
    processes: ContenderProcesses, sample: Sample, steps: int, limit_seconds: float
) -> float | None:
    """Seconds per step from the first rank's start to the last rank's end; None after a problem."""
    answers = processes.ask(f"run {steps}", limit_seconds * steps)
    if answers is None:
        return None
    sample.losses += _mean_losses(answers)
    sample.peak_resident_bytes = sum(int(a["peak_resident_bytes"]) for a in answers)
    began = min(float(a["began"]) for a in answers)
    return (max(float(a["ended"]) for a in answers) - began) / steps


def _mean_losses(answers: Sequence[dict[str, Any]]) -> list[float]:
    """Mean loss of each step over the ranks that know one: shares of a batch have equal size."""
    by_step = zip(*(a["losses"] for a in answers), strict=True)
    known = [[float(x) for x in step if x is not None] for step in by_step]
    return [sum(step) / len(step) for step in known if step]
