"""Lines through measured times: a start and rates that are not negative, by relative errors.

- Least squares of (line / measured - 1): a kernel of 20 microseconds counts as much as one of 20
  milliseconds.
- No rate is negative. Every subset of the three columns is tried, and the best of those whose
  numbers are all at least 0 is taken: with three columns that is exact.

Alternatives considered:
- An iterative solver for such problems: seven small systems need none.
"""

import math
from collections.abc import Sequence
from itertools import combinations

from k2train.plan.measured import Amount, Line
from k2train.planner.fit import solve

Point = tuple[Amount, float]
"""An amount of work, and its measured seconds."""
COLUMNS = 3


def fit_line(points: Sequence[Point]) -> tuple[Line, float]:
    """Line through points, and the root mean square of its relative errors."""
    assert points, "a line needs a point"
    best, best_error = (0.0,) * COLUMNS, math.inf
    for count in range(1, COLUMNS + 1):
        for columns in combinations(range(COLUMNS), count):
            values = _least_squares(points, columns)
            if values is None or min(values) < 0:
                continue
            error = _error(points, values)
            # A column that gains nothing is left out: it would be rounding alone.
            if error < best_error * (1 - 1e-6):
                best, best_error = values, error
    return Line(*best), best_error


def _least_squares(points: Sequence[Point], columns: Sequence[int]) -> tuple[float, ...] | None:
    """Coefficients of the chosen columns, 0 for the others; None where they are dependent."""
    scales = [max(amount[c] / seconds for amount, seconds in points) for c in columns]
    if not all(scales):
        return None
    rows = [
        [amount[c] / seconds / scale for c, scale in zip(columns, scales, strict=True)]
        for amount, seconds in points
    ]
    size = range(len(columns))
    matrix = [[sum(row[i] * row[j] for row in rows) for j in size] for i in size]
    right = [sum(row[i] for row in rows) for i in size]
    # A tiny ridge, relative to the diagonal: dependent columns then share instead of exploding.
    for i in size:
        matrix[i][i] *= 1 + 1e-9
    found = solve(matrix, right)
    values = [0.0] * COLUMNS
    for column, value, scale in zip(columns, found, scales, strict=True):
        values[column] = value / scale
    return tuple(values)


def _error(points: Sequence[Point], values: Sequence[float]) -> float:
    line = Line(*values)
    squares = [(line.seconds(amount) / seconds - 1) ** 2 for amount, seconds in points]
    return math.sqrt(sum(squares) / len(squares))
