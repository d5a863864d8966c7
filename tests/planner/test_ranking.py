"""Order of layouts: groups of one model and machine, and what a choice costs."""

import math

import pytest

from k2train.planner.fit import Judged
from k2train.planner.ranking import rank_correlation, ranking_lines, rankings
from k2train.planner.rows import case_of
from tests.planner.test_rows import ROW


def judged(measured: float, predicted: float, **cells: str) -> Judged:
    """A row that took `measured` seconds and was predicted to take others."""
    row = {**ROW, "model": "Llama", "published_step_s": str(measured), **cells}
    return Judged(case_of(row), predicted)


def test_correlations_are_spearmans() -> None:
    """Catches ranks that ties shift. Without ties it is 1 - 6 sum d^2 / (n^3 - n)."""
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Differences of ranks 1, 1, 1, 1, 0: 1 - 6 x 4 / 120.
    assert rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    # Two equal values share ranks 1.5: (2.25 + 2.25) / sqrt(5 x 4.5).
    assert rank_correlation([1, 2, 3, 4], [1, 2, 2, 3]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(rank_correlation([1, 2], [3, 3]))


def test_only_layouts_of_one_model_and_machine_are_compared() -> None:
    """Catches a batch or a machine that counts as a worse layout, and the wrong one chosen."""
    rows = [
        judged(10.0, 11.0),
        judged(12.0, 10.5, tp="4", dp="2"),
        judged(11.0, 12.0, tp="1", dp="8"),
        judged(20.0, 1.0, gbs="64"),
        judged(99.0, 1.0, n_gpus="32", dp="8"),
    ]
    (found,) = rankings(rows)
    assert (found.layouts, found.machine) == (3, "16 H100-80GB")
    assert found.slower == pytest.approx(0.2)
    assert found.correlation == pytest.approx(-0.5)
    lines = ranking_lines(rows)
    assert lines[-1].startswith("In 0 of 1 groups") and "| -0.50 | 20.0% |" in lines[-3]
    assert ranking_lines(rows[3:]) == []
