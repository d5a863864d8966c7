"""Goodput: against random failures one after another, and Young's and Daly's best intervals."""

import math
import random
from dataclasses import replace

import pytest

from k2train.plan.goodput import Reliability

CLUSTER = Reliability(between_failures=60000.0, detection=60.0, restart=600.0, stall=10.0)
LARGE = replace(CLUSTER, between_failures=8000 * 3600 / 16384)
"""480 and 16,384 devices at the published rate."""


def simulated(cluster: Reliability, interval: float, intervals: int, seed: int) -> float:
    """Share of the time that trains: a clock, a next failure, and what it takes away."""
    rng = random.Random(seed)
    clock = 0.0
    failure = rng.expovariate(1 / cluster.between_failures)
    for _ in range(intervals):
        while failure < clock + interval + cluster.stall:
            # Everything since the last save is gone. Whatever begins next may fail, too.
            clock = failure
            while True:
                failure = clock + rng.expovariate(1 / cluster.between_failures)
                if failure >= clock + cluster.detection + cluster.restart:
                    clock += cluster.detection + cluster.restart
                    break
                clock = failure
        clock += interval + cluster.stall
    return intervals * interval / clock


@pytest.mark.parametrize(
    ("cluster", "interval", "tolerance"),
    ((CLUSTER, None, 0.002), (CLUSTER, 9000.0, 0.006), (LARGE, None, 0.006), (LARGE, 900.0, 0.01)),
)
def test_random_failures_leave_as_much(
    cluster: Reliability, interval: float | None, tolerance: float
) -> None:
    """Catches losses to first order, half an interval taken as a whole one, and a start that never
    fails.
    """
    cluster = replace(cluster, interval=interval)
    intervals = int(12000 * cluster.between_failures / (cluster.used_interval + 10))
    found = simulated(cluster, cluster.used_interval, min(intervals, 200_000), 5)
    assert found == pytest.approx(cluster.goodput, rel=tolerance)


def test_the_first_order_is_that_of_small_losses() -> None:
    """Catches causes that are mixed up: each as added up by hand where failures are seldom."""
    lost = replace(CLUSTER, between_failures=6e6, interval=1000.0).lost
    assert lost["detection"] == pytest.approx(60 / 6e6 * 1.01, rel=1e-3)
    assert lost["restart"] == pytest.approx(600 / 6e6 * 1.01, rel=1e-3)
    assert lost["work done again"] == pytest.approx(1010 / 2 / 6e6 * 1.01, rel=1e-3)
    assert lost["saves"] == 0.01


@pytest.mark.parametrize("cluster", (CLUSTER, LARGE, replace(LARGE, stall=300.0)))
def test_no_other_interval_loses_less(cluster: Reliability) -> None:
    """Catches a formula that is off by a factor; Daly's series for the same optimum agrees."""
    best, stall, between = cluster.best_interval, cluster.stall, cluster.between_failures
    for factor in (0.5, 0.95, 1.05, 2.0):
        assert replace(cluster, interval=factor * best).goodput < cluster.goodput
    root = math.sqrt(stall / (2 * between))
    daly = math.sqrt(2 * stall * between) * (1 + root / 3 + root**2 / 9) - stall
    assert best == pytest.approx(daly, rel=2e-3)
    young = math.sqrt(2 * stall * between)
    assert 0 < young - best < stall


def test_no_losses_and_saves_longer_than_the_time_between_failures() -> None:
    """Catches a division by zero, and an interval that is none."""
    assert replace(CLUSTER, detection=0.0, restart=0.0).lost["restart"] == 0.0
    hopeless = Reliability(between_failures=10.0, detection=0.0, restart=0.0, stall=40.0)
    assert 0 < hopeless.best_interval <= 10.0 and 0 < hopeless.goodput < 0.05
