"""Lines through measured times."""

import random

import numpy as np
import pytest

from k2train.calibrate.fit import fit_line
from k2train.plan.measured import Amount, Line, product_amount

SHAPES = [(n, k, m) for n in (64, 256, 1024) for k in (32, 128, 512) for m in (64, 512)]


def test_a_line_is_found_again_from_noisy_times() -> None:
    """Catches a column that is swapped, and errors that count by their seconds: the fit is numpy's
    of the relative errors."""
    true, draw = Line(2e-5, 1.1e-11, 1.5e-10), random.Random(3)
    points: list[tuple[Amount, float]] = []
    for shape in SHAPES:
        amount = product_amount(*shape, 4)
        points.append((amount, true.seconds(amount) * draw.uniform(0.95, 1.05)))
    line, error = fit_line(points)
    rows = np.array([[x / seconds for x in amount] for amount, seconds in points])
    expected = np.linalg.lstsq(rows, np.ones(len(points)), rcond=None)[0]
    found = (line.start_seconds, line.seconds_per_flop, line.seconds_per_byte)
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0.01 < error < 0.05
    assert found == pytest.approx((2e-5, 1.1e-11, 1.5e-10), rel=0.2)


def test_no_rate_is_negative() -> None:
    """Catches a kernel that a plan takes for faster the more it moves."""
    # Bytes that cost less than nothing: the best without them remains.
    points = [
        ((1.0, flops, size), 1e-5 + 1e-11 * flops - 1e-12 * size)
        for flops in (1e6, 1e7, 1e8)
        for size in (1e5, 1e6)
    ]
    line, _ = fit_line(points)
    assert line.seconds_per_byte == 0.0
    assert line.seconds_per_flop == pytest.approx(1e-11, rel=0.05)
    assert fit_line([((1.0, 0.0, 1e6), 1e-3)])[1] == pytest.approx(0.0, abs=1e-9)
