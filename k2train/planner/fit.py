"""Fit of the cost model's constants to published step times, and its errors on unseen sources.

- Ridge regression of the logarithms around their priors, by Gauss-Newton steps, with Huber weights:
  one broken row does not bend a constant.
- A source with many rows counts as its square root, so that no laboratory decides alone.
- Errors are leave-one-source-out: each source is predicted with constants that have not seen it.

Alternatives considered:
- Least squares without priors: constants of a term that few rows show run away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from k2train.errors import ConfigError
from k2train.plan.efficiency import GENERATIONS, LOW, PRIOR, SHARED, Constants
from k2train.plan.step_time import step_time
from k2train.planner.rows import Case

OWN = ("matmul", "attention")
"""Constants that each generation has for itself."""
ROW_SPREAD = 0.05
"""Standard deviation of a row's logarithm: what two laboratories differ by with one layout."""
HUBER = 2.0
"""Spreads from which on a row's pull stays the same."""
ROUNDS = 4
STEP = 1e-3

Values = dict[str, float]


@dataclass(frozen=True)
class Judged:
    """A measured row and its prediction."""

    case: Case
    seconds: float

    @property
    def error(self) -> float:
        """Predicted for measured, less one."""
        measured = self.case.measured_seconds
        assert measured, "only measured rows are judged"
        return self.seconds / measured - 1


def names_of(cases: Iterable[Case]) -> list[str]:
    """Names of the constants that these rows can fit: `hopper.matmul`, `memory` ..."""
    generations = sorted({case.cluster.device.generation for case in cases})
    return [f"{kind}.{name}" for kind in generations for name in OWN] + list(SHARED)


def prior_values(names: Iterable[str]) -> Values:
    """Each constant before any row."""
    return {name: _prior(name)[0] for name in names}


def _prior(name: str) -> tuple[float, float]:
    """(value, standard deviation of its logarithm) of a constant."""
    generation, _, own = name.rpartition(".")
    value, spread = PRIOR[own]
    if generation:
        value = PRIOR_OWN[generation, own]
    return value, spread


PRIOR_OWN = {
    ("ampere", "matmul"): 0.80,
    ("hopper", "matmul"): 0.72,
    ("blackwell", "matmul"): 0.72,
    ("blackwell-ultra", "matmul"): 0.72,
    ("cpu", "matmul"): 0.70,
    ("ampere", "attention"): 0.58,
    ("hopper", "attention"): 0.36,
    ("blackwell", "attention"): 0.36,
    ("blackwell-ultra", "attention"): 0.36,
    ("cpu", "attention"): 0.40,
}
"""Shares before any row: large products on a device at its power limit, and the authors' own
measurements of FlashAttention-2 (see `FUSED_ATTENTION`)."""


def constants_for(values: Mapping[str, float], generation: str) -> Constants:
    """Constants of one generation from fitted values."""
    known = {name: values[name] for name in (*SHARED, *LOW) if name in values}
    for name in OWN:
        if f"{generation}.{name}" in values:
            known[name] = values[f"{generation}.{name}"]
    return replace(GENERATIONS[generation], **known)


def predicted(case: Case, values: Mapping[str, float]) -> float:
    """Seconds of a case with fitted values."""
    constants = constants_for(values, case.cluster.device.generation)
    return step_time(case.work, case.cluster, constants).seconds


def fit(cases: Sequence[Case], names: Sequence[str] = ()) -> Values:
    """Constants that fit measured cases best, given their priors. Raises ConfigError for none.

    `names`: fit only these, and keep the others at their shipped values.
    """
    cases = [case for case in cases if case.measured_seconds]
    if not cases:
        raise ConfigError("no row with a measured time (published_step_s) to fit constants on")
    names = names or names_of(cases)
    values = prior_values(names)
    counts = {case.source: 0 for case in cases}
    for case in cases:
        counts[case.source] += 1

    for _ in range(ROUNDS):
        base = [math.log(predicted(case, values)) for case in cases]
        errors = [
            math.log(case.measured_seconds or 1) - b for case, b in zip(cases, base, strict=True)
        ]
        slopes = []
        for name in names:
            moved = {**values, name: values[name] * math.exp(STEP)}
            slopes.append(
                [
                    (math.log(predicted(case, moved)) - b) / STEP
                    for case, b in zip(cases, base, strict=True)
                ]
            )
        weights = [
            min(1.0, HUBER * ROW_SPREAD / max(abs(error), 1e-12))
            / (ROW_SPREAD**2 * math.sqrt(counts[case.source]))
            for case, error in zip(cases, errors, strict=True)
        ]
        matrix, right = _normal(names, values, slopes, errors, weights)
        for name, change in zip(names, solve(matrix, right), strict=True):
            values[name] *= math.exp(max(-0.3, min(0.3, change)))
            if name not in ("host_seconds", "step_seconds", "eager"):
                values[name] = min(values[name], 0.98)
    return values


def _normal(
    names: Sequence[str],
    values: Values,
    slopes: Sequence[Sequence[float]],
    errors: Sequence[float],
    weights: Sequence[float],
) -> tuple[list[list[float]], list[float]]:
    """Normal equations of one Gauss-Newton step, the priors included."""
    size = len(names)
    matrix = [
        [
            sum(w * a * b for w, a, b in zip(weights, slopes[i], slopes[j], strict=True))
            for j in range(size)
        ]
        for i in range(size)
    ]
    right = [
        sum(w * a * e for w, a, e in zip(weights, slopes[i], errors, strict=True))
        for i in range(size)
    ]
    for i, name in enumerate(names):
        value, spread = _prior(name)
        matrix[i][i] += 1 / spread**2
        right[i] += math.log(value / values[name]) / spread**2
    return matrix, right


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solution of a positive definite system, by elimination with pivots."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(rows[i][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for other in range(size):
            if other != column:
                factor = rows[other][column] / rows[column][column]
                rows[other] = [
                    a - factor * b for a, b in zip(rows[other], rows[column], strict=True)
                ]
    return [rows[i][size] / rows[i][i] for i in range(size)]


def leave_one_source_out(cases: Sequence[Case]) -> list[Judged]:
    """Each measured row, predicted with constants from all other sources."""
    measured = [case for case in cases if case.measured_seconds]
    found = []
    for source in dict.fromkeys(case.source for case in measured):
        own = [case for case in measured if case.source == source]
        others = [case for case in measured if case.source != source]
        values = fit(others)
        # A generation that no other source shows keeps its prior.
        values = prior_values(names_of(own)) | values
        found += [Judged(case, predicted(case, values)) for case in own]
    return found
