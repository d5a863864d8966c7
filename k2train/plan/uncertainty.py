"""Interval of a predicted step time, from named uncertainties.

- Each constant is moved by its spread, and the step predicted again: links, matrix products, fused
  attention, memory, overlap, host. Their effects are added as independent ones.
- The host's spread is its prior's. It decides small models, whose kernels end before the next
  starts: no published row is of that kind.
- Besides, programs differ by what no constant of a machine knows. That spread is the one of sources
  which a fit had not seen.
- A generation without published rows in the workload's precision gets wider spreads, and says so.
- A measured machine has no such constants: its spread is that of its measurements, twice that of a
  noisy one, and that of programs.

Alternatives considered:
- One percentage for every step: a step bound by links is less sure than one bound by products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from k2train.plan.efficiency import CALIBRATED, Constants, constants_of
from k2train.plan.hardware import Cluster
from k2train.plan.measured import Measured
from k2train.plan.step_time import step_time
from k2train.plan.workload import Workload

NORMAL_90 = 1.645
"""Standard deviations on each side that hold 90 % of a normal distribution."""
SPREADS: Mapping[str, Mapping[str, float]] = {
    "link": {"inner_link": 0.10, "network": 0.20},
    "matmul efficiency": {"matmul": 0.04},
    "attention": {"attention": 0.15},
    "memory": {"memory": 0.08},
    "overlap": {"exposed": 0.60},
    "host": {"host_seconds": 0.70, "step_seconds": 0.70},
}
"""Constants that each uncertainty moves, and by how much (standard deviation of the logarithm)."""
LOW_SPREADS: Mapping[str, float] = {"mxfp8": 0.08, "nvfp4": 0.20}
"""The same of a precision's own constant: rows of one generation and one program."""
PROGRAM_SPREAD = 0.085
"""Spread of programs that the model cannot tell apart."""
UNCALIBRATED = 2.0
"""Factor on every spread for a generation without rows."""


@dataclass(frozen=True)
class Interval:
    """Nine of ten steps are between `low` and `high`, seconds."""

    seconds: float
    low: float
    high: float
    parts: Mapping[str, float]
    """Standard deviation of the logarithm from each uncertainty."""
    calibrated: bool


def interval(work: Workload, cluster: Cluster, constants: Constants | None = None) -> Interval:
    """Predict a step with its interval."""
    if cluster.measured is not None:
        return _measured_interval(work, cluster, cluster.measured)
    generation = cluster.device.generation
    constants = constants or constants_of(generation)
    calibrated = work.precision in CALIBRATED.get(generation, ())
    factor = 1.0 if calibrated else UNCALIBRATED

    seconds = step_time(work, cluster, constants).seconds
    parts = {"program": factor * PROGRAM_SPREAD}
    own = {f"{work.precision} products": {work.precision: LOW_SPREADS.get(work.precision, 0.0)}}
    uncertain = {**SPREADS, **own} if work.precision in LOW_SPREADS else SPREADS
    for name, spreads in uncertain.items():
        moved = {key: getattr(constants, key) / math.exp(spread) for key, spread in spreads.items()}
        if name == "overlap":
            moved = {"exposed": min(1.0, constants.exposed * math.exp(spreads["exposed"]))}
        slower = step_time(work, cluster, replace(constants, **moved)).seconds
        parts[name] = factor * abs(math.log(slower / seconds))

    return _around(seconds, parts, calibrated)


def _measured_interval(work: Workload, cluster: Cluster, measured: Measured) -> Interval:
    """Interval of a step on a machine whose kernels were measured."""
    factor = UNCALIBRATED if measured.noisy else 1.0
    parts = {
        "program": PROGRAM_SPREAD,
        # The quartiles of a normal distribution are 1.35 standard deviations apart.
        "repeated measurements": factor * measured.spread / 1.35,
        "lines": factor * measured.error,
    }
    return _around(step_time(work, cluster).seconds, parts, not measured.noisy)


def _around(seconds: float, parts: Mapping[str, float], calibrated: bool) -> Interval:
    """Interval of 90 % from independent parts."""
    spread = math.exp(NORMAL_90 * math.sqrt(sum(part**2 for part in parts.values())))
    return Interval(seconds, seconds / spread, seconds * spread, parts, calibrated)
