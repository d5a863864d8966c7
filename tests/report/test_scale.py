"""Scales: ticks outside of the picture, a value at the wrong pixel, an empty or single range."""

import math

import pytest

from k2train.report.scale import Scale, range_of, short_number, ticks


def test_pixels_of_a_linear_and_a_logarithmic_scale() -> None:
    """Catches a flipped axis, and a logarithm where none was asked."""
    assert Scale(0.0, 10.0, 100.0, 0.0)(2.5) == 75.0
    assert Scale(1.0, 100.0, 0.0, 200.0, log=True)(10.0) == 100.0
    # Beyond the ends it is cut off.
    assert Scale(0.0, 10.0, 100.0, 0.0)(99.0) == 0.0


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0.0, 1.0, False), (2.13, 2.14, False), (-5.0, 1e6, False), (1e-7, 3e-4, True), (3, 8, True)],
)
def test_ticks_are_inside_and_ascending(low: float, high: float, log: bool) -> None:
    """Catches ticks in the margin, and an axis without any."""
    found = Scale(low, high, 0.0, 1.0, log).ticks()
    assert 2 <= len(found) <= 10 and found == sorted(found)
    assert low <= found[0] * (1 + 1e-9) and found[-1] <= high * (1 + 1e-9)


def test_ticks_around_a_range() -> None:
    """Catches ticks that leave the ends of the data outside, which plot_loss draws to."""
    assert ticks(0.3, 9.2) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_ranges_are_never_empty() -> None:
    """Catches a division by a range of zero, and a logarithm of zero."""
    assert range_of([]) == (0.0, 1.0)
    low, high = range_of([2.0, 2.0])
    assert low < 2.0 < high
    assert range_of([0.0, -1.0, 5.0, 10.0, math.nan], log=True) == (5.0, 10.0)


def test_labels_of_ticks() -> None:
    """Catches labels that are longer than the margin."""
    values = (0.0, 0.25, 1500.0, 2e6, 3e9, 1.5e-7)
    assert [short_number(v) for v in values] == ["0", "0.25", "1.5K", "2M", "3B", "1.5e-07"]
