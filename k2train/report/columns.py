"""Reduction of a series to the columns of a picture: lowest, mean and highest value of each.

- A spike of one step among a million stays visible as the highest value of its column.
- The size of a figure depends on its width, not on the length of the run.

Alternatives considered:
- Every n-th step: it loses exactly the steps of interest.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Point = tuple[float, float]
"""A value at a place on the axis, such as a step."""


class Column(NamedTuple):
    """The values between two places on the axis."""

    x: float
    """Place of the last value."""
    low: float
    mean: float
    high: float


def columns(points: Sequence[Point], most: int) -> list[Column]:
    """Reduce points, in the order of their places, to at most `most` columns of equal width.

    Values that are not finite are left out.
    """
    finite = [point for point in points if math.isfinite(point[1])]
    if not finite:
        return []
    if len(finite) <= most:
        return [Column(x, value, value, value) for x, value in finite]

    first, width = finite[0][0], (finite[-1][0] - finite[0][0]) / most or 1.0
    parts: dict[int, list[Point]] = {}
    for point in finite:
        parts.setdefault(min(most - 1, int((point[0] - first) / width)), []).append(point)
    return [_column(part) for _, part in sorted(parts.items())]


def _column(part: Sequence[Point]) -> Column:
    values = [value for _, value in part]
    mean = math.fsum(values) / len(values)
    return Column(part[-1][0], min(values), mean, max(values))
