"""Columns of a curve: a spike averaged away, a value that is not finite, too many points."""

import math
import random

from k2train.report.columns import Column, columns


def test_a_spike_of_one_step_in_a_hundred_thousand_is_seen() -> None:
    """Catches every n-th value taken in place of the highest one."""
    points = [(float(n), 2.0) for n in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    found = columns(points, 400)
    assert len(found) == 400 and max(column.high for column in found) == 9.0
    (spiked,) = [column for column in found if column.high == 9.0]
    assert spiked.low == 2.0 and spiked.mean == 2.0 + 7.0 / 250


def test_columns_hold_every_finite_value_once() -> None:
    """Catches values at the edge of a column counted twice or lost, by sums over all of them."""
    drawn = random.Random(4)
    points = [(float(n), drawn.uniform(-1, 1)) for n in range(997)]
    for most in (1, 7, 996, 997, 2000):
        found = columns(points, most)
        assert len(found) <= max(most, 1)
        assert min(c.low for c in found) == min(v for _, v in points)
        assert max(c.high for c in found) == max(v for _, v in points)
        assert [c.x for c in found] == sorted({c.x for c in found})


def test_values_that_are_not_finite_are_left_out() -> None:
    """Catches nan in the coordinates of a line, which draws nothing of it."""
    points = [(1.0, math.nan), (2.0, 3.0), (3.0, math.inf)]
    assert columns(points, 10) == [Column(2.0, 3.0, 3.0, 3.0)]
    assert columns([(1.0, math.nan)], 10) == []
