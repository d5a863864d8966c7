"""A machine measured: which processes are timed, and the cluster that their times make.

- One rank with all cores, then as many ranks as share them: each number of ranks has its own lines,
  because ranks on a CPU share caches and memory.
- Collectives are timed up to the largest number of ranks asked for, also beyond the cores.

Alternatives considered:
- One measurement, scaled by the number of ranks: memory does not scale with them.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from k2train.calibrate.fit import Point, fit_line
from k2train.calibrate.processes import run_task
from k2train.calibrate.speeds import rank_speed
from k2train.errors import ConfigError
from k2train.plan.hardware import Cluster, Device, Link
from k2train.plan.measured import Line, Measured
from k2train.planner.measured_section import COLLECTIVES, KERNELS
from k2train.record.system_info import processor_name
from k2train.text import counted
from k2train.train.machine import has_accelerator

OVERSUBSCRIBED = 4
"""Most ranks for each core: beyond, a step says nothing about a machine."""
LIMIT_SECONDS = 280.0
QUICK_ROUNDS, ROUNDS = 8, 15


@dataclass(frozen=True)
class Request:
    """What is measured, and how."""

    device: str
    """`cpu` or `cuda`."""
    ranks: int
    """Largest number of ranks whose collectives are timed."""
    cores: int
    precisions: tuple[str, ...] = ("fp32", "bf16")
    rounds: int = ROUNDS
    clock: str = "elapsed"
    tiny: bool = False
    """Tiny shapes, for a walk through the code."""

    @property
    def kind(self) -> str:
        """Kind of device whose large engines are stepped; a tiny walk takes those of a CPU."""
        return "cpu" if self.tiny else self.device

    def counts(self) -> list[int]:
        """Numbers of ranks to be timed: 1, 2, 4 ... and the largest."""
        powers = [2**i for i in range(self.ranks.bit_length()) if 2**i < self.ranks]
        return [*powers, self.ranks]

    def threads(self, ranks: int) -> int:
        """Threads of each rank, as a run has them: all cores for one, else one for each."""
        return self.cores if ranks == 1 else 1


def checked_ranks(asked: int | None, device: str, devices: int, cores: int) -> int:
    """Largest number of ranks. Raises ConfigError for more than the machine has."""
    if device == "cuda":
        if asked and asked > devices:
            raise ConfigError(
                f"--ranks ({asked}) must be at most {devices}: this machine has {devices} GPUs"
            )
        return asked or devices
    most = OVERSUBSCRIBED * cores
    if asked and asked > most:
        raise ConfigError(
            f"--ranks ({asked}) must be at most {most}: {OVERSUBSCRIBED} for each of {cores} cores"
        )
    return asked or max(4, min(cores, 16))


def device_of_machine(asked: str) -> tuple[str, int]:
    """(device type, GPUs) to be measured, for `auto`, `cpu` or `cuda`.

    Raises ConfigError for a GPU that torch does not find.
    """
    if asked == "cpu" or (asked == "auto" and not has_accelerator()):
        return "cpu", 0
    # Only torch knows what it can use.
    (facts,) = run_task({"facts": True, "ranks": 1, "threads": 0}, LIMIT_SECONDS)
    devices = int(facts["devices"])
    if asked == "cuda" and not devices:
        raise ConfigError("--device cuda: torch finds no GPU here; leave it out, or say cpu")
    return ("cuda" if devices else "cpu"), devices


def cores_of_machine() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def measure(
    request: Request, when: str, links: Sequence[Link], watts: float, log: Callable[[str], None]
) -> Cluster:
    """Measure the machine. `links`, if any, are taken as given; `watts` of a device for energy.

    Raises ConfigError where ranks cannot reach each other, UnavailableError where a process fails.
    """
    if request.ranks == 1 and not links:
        raise ConfigError(
            "one rank has no link to measure: give --links CLUSTER, whose links are then taken, or "
            "--ranks 2 on a machine that has them"
        )
    counts, results = request.counts(), {}
    for ranks in counts:
        shares = request.device == "cuda" or ranks <= request.cores
        log(f"{ranks} rank{'s' if ranks > 1 else ''} on {request.device} ...")
        results[ranks] = run_task(_task(request, ranks, shares), LIMIT_SECONDS)

    timed = {ranks: found for ranks, found in results.items() if "kernels" in found[0]}
    fitted = {ranks: _lines(found) for ranks, found in timed.items()}
    collectives, link_error = _collectives(results)
    first = results[counts[0]][0]
    cores = request.cores if request.device == "cpu" else None
    errors = [error for lines in fitted.values() for error in lines.errors]
    spreads = sorted(row[4] for found in timed.values() for row in found[0]["kernels"])

    processor = processor_name() or "unknown processor"
    measured = Measured(
        when,
        f"{processor}, {counted(request.cores, 'core')}",
        first["facts"]["torch"],
        cores,
        # Three of four kernels are steadier.
        spreads[3 * len(spreads) // 4],
        math.sqrt(statistics.fmean([*(error**2 for error in errors), link_error**2])),
        (),
        collectives,
    )
    cluster = Cluster(
        f"measured-{request.device}",
        _device(request, first, timed[1][0], watts),
        tuple(links) or _links(collectives),
        measured,
    )
    speeds = tuple(
        rank_speed(
            cluster, request.threads(ranks), ranks, fitted[ranks].lines, timed[ranks], request.kind
        )
        for ranks in timed
    )
    return replace(cluster, measured=replace(measured, speeds=speeds))


def _task(request: Request, ranks: int, kernels: bool) -> dict[str, Any]:
    return {
        "facts": False,
        "device": request.device,
        "ranks": ranks,
        "threads": request.threads(ranks),
        "precisions": request.precisions,
        "rounds": request.rounds,
        "clock": request.clock,
        "kernels": kernels,
        "tiny": request.tiny,
    }


@dataclass(frozen=True)
class _Fitted:
    lines: dict[str, dict[str, Line]]
    errors: list[float]


def _lines(found: Sequence[Mapping[str, Any]]) -> _Fitted:
    """Line of each precision and kernel; of several ranks their mean counts."""
    points: dict[str, dict[str, list[Point]]] = {}
    for index, (precision, name, amount, _, _) in enumerate(found[0]["kernels"]):
        if name in KERNELS:
            seconds = statistics.fmean(one["kernels"][index][3] for one in found)
            points.setdefault(precision, {}).setdefault(name, []).append((tuple(amount), seconds))
    lines: dict[str, dict[str, Line]] = {}
    errors = []
    for precision, kernels in points.items():
        lines[precision] = {}
        for name in KERNELS:
            lines[precision][name], error = fit_line(kernels[name])
            errors.append(error)
    return _Fitted(lines, errors)


def _collectives(
    results: Mapping[int, Sequence[Mapping[str, Any]]],
) -> tuple[dict[str, dict[int, Line]], float]:
    """Lines by kind and ranks, and their error."""
    found: dict[str, dict[int, Line]] = {}
    errors = [0.0]
    for kind in COLLECTIVES:
        for ranks, each in results.items():
            rows = [row for one in each for row in one.get("collectives", []) if row[0] == kind]
            points: list[Point] = []
            for size in sorted({row[1] for row in rows}):
                seconds = statistics.fmean(row[2] for row in rows if row[1] == size)
                # A sample of sends goes there and back.
                points.append(((1.0, 0.0, float(size)), seconds / (2 if kind == "send" else 1)))
            if points:
                line, error = fit_line(points)
                found.setdefault(kind, {})[ranks] = line
                errors.append(error)
    return found, math.sqrt(statistics.fmean(error**2 for error in errors))


def _links(collectives: Mapping[str, Mapping[int, Line]]) -> tuple[Link, ...]:
    """The one link of a machine, from its sends."""
    lines = collectives["send"]
    line = lines[min(lines)]
    rate = 1 / line.seconds_per_byte if line.seconds_per_byte else 1e12
    return (Link("measured", 0, rate, line.start_seconds),)


def _device(
    request: Request, first: Mapping[str, Any], one: Mapping[str, Any], watts: float
) -> Device:
    """Device from the rank that was alone: largest product, largest copy."""
    peaks = {
        precision: amount[1] / seconds
        for precision, name, amount, seconds, _ in one["kernels"]
        if name == "peak"
    }
    (memory,) = [amount[2] / s for _, name, amount, s, _ in one["kernels"] if name == "copy"]
    # Attention's precision must be there; a machine without it is as fast as its fp32.
    peaks.setdefault("bf16", peaks.get("fp32", 0.0))
    facts = first["facts"]
    generation = "cpu" if request.device == "cpu" else _generation(facts["device"])
    size = facts["memory_bytes"] / (request.cores if request.device == "cpu" else 1)
    name = facts["device"] or (processor_name() or "CPU")
    return Device(name, generation, peaks, size, memory, watts)


def _generation(name: str) -> str:
    """Generation of a GPU by its name; the newest for one that no constant speaks of."""
    marks = {"A100": "ampere", "A800": "ampere", "H100": "hopper", "H200": "hopper"}
    found = [kind for mark, kind in marks.items() if mark in name]
    return found[0] if found else "blackwell"
