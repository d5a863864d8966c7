"""Checkpoint interval: estimator and choice by hand, and a simulation of failures.

Catches an interval that follows nothing measured, and one that costs much more than the best.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from k2train.guard.failure_history import FailureHistory, SaveCost
from k2train.guard.save_interval import (
    PRIOR_DEVICE_SECONDS,
    SaveTimer,
    best_interval,
    choose_interval,
    mean_time_between_failures,
)

HOUR = 3600.0
DAY = 24 * HOUR
K2 = 480
"""Devices of K2."""


@pytest.mark.parametrize(
    ("failures", "trained", "devices", "mtbf"),
    (
        # Nothing measured: the published 8,000 device hours, over 480 devices 16 h 40 min.
        (0, 0.0, K2, 60_000.0),
        # Ten hours without a failure make it longer.
        (0, 10 * HOUR, K2, 96_000.0),
        # The prior would say (3 h + 16 h 40) / 2; the one failure after 3 h says less.
        (1, 3 * HOUR, K2, 3 * HOUR),
        # Two in 90 h: (90 h + 16 h 40) / 3, a third less than 45 h.
        (2, 90 * HOUR, K2, 128_000.0),
        (3, 9.2 * HOUR, K2, 11_040.0),
        # One device, killed three times within a second: 8,000 hours hide nothing.
        (3, 0.9, 1, 0.3),
    ),
)
def test_the_estimate_by_hand(failures: int, trained: float, devices: int, mtbf: float) -> None:
    assert mean_time_between_failures(failures, trained, devices) == pytest.approx(mtbf, rel=1e-12)


def test_the_best_interval_by_hand() -> None:
    """sqrt(2 x 0.5 s x 10,000 s) is 100 s; a save that takes 70 s asks for 140 s."""
    assert best_interval(10_000.0, SaveCost(0.5, 20.0)) == 100.0
    assert best_interval(10_000.0, SaveCost(0.5, 70.0)) == 140.0


@pytest.mark.parametrize(
    ("history", "devices", "cost", "chunk", "seconds", "first"),
    (
        # K2 at its first start: sqrt(2 x 3 x 60,000) = 600 s in a chunk of 7 h.
        (FailureHistory(), K2, SaveCost(3.0, 70.0), 7 * HOUR, 600.0, None),
        # What one device does in a day needs no save inside, nor does a chunk of minutes.
        (FailureHistory(), 1, SaveCost(3.0, 70.0), DAY, None, None),
        (FailureHistory(), K2, SaveCost(3.0, 70.0), 600.0, None, None),
        # Before a step was measured nobody knows how long a chunk is.
        (FailureHistory(), K2, SaveCost(3.0, 70.0), None, None, None),
        # Three failures in 9.2 h: sqrt(2 x 0.5 x 11,040) = 105.07 s, saves take 30 s.
        (
            FailureHistory(3, 9.2 * HOUR * K2),
            *(K2, SaveCost(0.5, 30.0), 7 * HOUR, math.sqrt(11_040.0), None),
        ),
        # Starts that ended after 10 min with nothing saved: half of that, less the save.
        (
            FailureHistory(3, 0.5 * HOUR, interrupted_seconds=600.0),
            *(1, SaveCost(0.5, 30.0), 500.0, 60.0, 270.0),
        ),
        # They had less time than a save takes: at once.
        (
            FailureHistory(3, 60.0, interrupted_seconds=20.0),
            *(1, SaveCost(0.5, 30.0), 50.0, None, 0.0),
        ),
    ),
)
def test_the_choice_by_hand(
    history: FailureHistory,
    devices: int,
    cost: SaveCost,
    chunk: float | None,
    seconds: float | None,
    first: float | None,
) -> None:
    chosen = choose_interval(history, devices, cost, chunk)
    assert (chosen.seconds, chosen.first_seconds) == (pytest.approx(seconds), first)


def test_the_line_says_how_often_and_why() -> None:
    history = FailureHistory(3, 9.2 * HOUR * K2, interrupted_seconds=1200.0)
    # sqrt(2 x 0.4 x 11,040 s) is 94 s, less than two saves of 70 s.
    text = choose_interval(history, K2, SaveCost(0.4, 70.0), 7 * HOUR).text()
    assert text == (
        "saves every 2m20s inside chunks, first after 8m50s, since starts ended before they had "
        "saved: 3 failures in 9h12m of training; a save stalls 0.4 s, takes 70.0 s "
        "(checkpoint.every_seconds: auto)"
    )
    text = choose_interval(FailureHistory(), K2, SaveCost(0.4, 20.0), 7 * HOUR).text()
    assert text == (
        "saves every 3m40s inside chunks: no failure yet, one in 16h40m expected on so many "
        "devices; a save stalls 0.4 s, takes 20.0 s (checkpoint.every_seconds: auto)"
    )


# When a save is due.


def test_a_fixed_interval_stays() -> None:
    """Catches a measurement that moves what the config fixes; 0 means never."""
    history = FailureHistory(9, 10.0, 1.0, 0.5, (SaveCost(0.1, 0.2),))
    never, fixed = SaveTimer(0.0, 100, 1, history), SaveTimer(20.0, 100, 1, history)
    for timer in (never, fixed):
        timer.restart(1000.0)
        assert timer.interval is None and not timer.is_due(1019.0, False)
    assert fixed.is_due(1020.0, False) and not never.is_due(1e9, False)


def timer_of(history: FailureHistory, chunk_steps: int = 1000) -> SaveTimer:
    """A timer at 1000 s, one device."""
    timer = SaveTimer("auto", chunk_steps, 1, history)
    timer.restart(1000.0)
    return timer


# 100 failures in 100,000 s: an MTBF of 1000 s. sqrt(2 x 2 x 1000) is 63.2 s; a step takes 10 s.
FAILING = FailureHistory(100, 100_000.0, 10.0, saves=(SaveCost(2.0, 5.0),))


@pytest.mark.parametrize(
    ("now", "saving", "due"),
    (
        # The save begins when the step ends: after 50 + 10 s, and after 60 + 10 s.
        (1050.0, False, False),
        (1060.0, False, True),
        # Never behind one that is still running.
        (1060.0, True, False),
    ),
)
def test_a_chosen_interval_is_kept(now: float, saving: bool, due: bool) -> None:
    assert timer_of(FAILING).is_due(now, saving) == due


def test_the_first_save_comes_before_earlier_starts_ended() -> None:
    """Catches a run that is interrupted for ever: three starts had 30 s, a save takes 5 s."""
    timer = timer_of(replace(FAILING, interrupted_seconds=30.0))
    # 30 / 2 - 5 is 10 s: the end of the first step.
    assert timer.is_due(1000.0, False)
    timer.step_done(10.0)
    timer.saving(1010.0)
    # From then on as usual, counted from the save.
    assert not timer.is_due(1050.0, False) and timer.is_due(1070.0, False)


def test_the_save_before_the_first_step_is_not_the_first_save() -> None:
    timer = timer_of(replace(FAILING, interrupted_seconds=30.0))
    timer.saving(1000.0)
    assert timer.is_due(1005.0, False)


def test_a_run_without_failures_learns_its_costs() -> None:
    """Catches an interval from the first, slow steps, or from a save nobody has measured."""
    timer = SaveTimer("auto", 1000, K2)
    timer.restart(0.0)
    for _ in range(3):
        assert not timer.is_due(1e6, False)
        timer.step_done(26.0)
    assert not timer.is_due(1e6, False)
    timer.saved(SaveCost(3.0, 70.0))
    # sqrt(2 x 3 x (60,000 + 78)) is 600.4 s, and the step that begins takes 26.
    assert timer.is_due(575.0, False) and not timer.is_due(574.0, False)


def test_alike_from_the_same_record() -> None:
    assert timer_of(FAILING).interval == timer_of(FAILING).interval


def test_one_slow_save_moves_nothing() -> None:
    """Catches an interval set by an outlier: the median of the last five counts."""
    timer = timer_of(replace(FAILING, saves=(SaveCost(2.0, 5.0),) * 5))
    before = timer.interval
    timer.saved(SaveCost(50.0, 900.0))
    assert timer.interval == before


# Against the best fixed interval.

Policy = Callable[[FailureHistory, float], float]
"""History before this start, seconds trained in it -> seconds to the next save."""


def kept_work(lifetimes: Sequence[float], cost: SaveCost, policy: Policy, devices: int) -> float:
    """Seconds of training that reached a whole checkpoint, over starts that end by a failure."""
    history, kept, streak = FailureHistory(), 0.0, list[float]()
    for life in lifetimes:
        now = trained = saved = 0.0
        if streak:
            history = replace(history, interrupted_seconds=min(streak))
        while True:
            pause = policy(history, trained)
            # A failure before the checkpoint is whole takes all work back to the one before.
            if now + pause + cost.seconds >= life:
                break
            now += pause + cost.stall
            trained += pause
            saved = trained
            history = replace(history, interrupted_seconds=None)
        kept += saved
        streak = [] if saved else [*streak, life]
        seconds = history.device_seconds + life * devices
        history = FailureHistory(history.failures + 1, seconds)
    return kept


@pytest.mark.parametrize("wrong", (1 / 20, 1.0, 20.0))
@pytest.mark.parametrize(
    ("mtbf", "cost"),
    (
        (3 * HOUR, SaveCost(0.4, 70.0)),
        (3 * HOUR, SaveCost(20.0, 25.0)),
        (30 * HOUR, SaveCost(3.0, 70.0)),
        (0.5 * HOUR, SaveCost(2.0, 10.0)),
        (10 * DAY, SaveCost(60.0, 60.0)),
    ),
)
def test_close_to_the_best_fixed_interval(mtbf: float, cost: SaveCost, wrong: float) -> None:
    """Lost time at most 10 % above that of the best fixed interval, with a prior up to twenty times
    wrong.

    The best one is found afterwards for the very same failures, which a run cannot know.
    """
    devices = max(1, round(PRIOR_DEVICE_SECONDS / (wrong * mtbf)))
    random = np.random.Generator(np.random.Philox(key=7))
    lifetimes = [float(life) for life in random.exponential(mtbf, 150)]

    def chosen(history: FailureHistory, trained: float) -> float:
        known = replace(history, device_seconds=history.device_seconds + trained * devices)
        interval = choose_interval(known, devices, cost, 1e12)
        limits = [s for s in (interval.seconds, interval.first_seconds) if s is not None]
        return max(1.0, min(limits))

    total = sum(lifetimes)
    lost = total - kept_work(lifetimes, cost, chosen, devices)
    young = math.sqrt(2 * cost.stall * mtbf)
    # Shorter than a save takes, they would queue.
    tried = np.geomspace(max(young / 3, cost.seconds), max(3 * young, 6 * cost.seconds), 20)
    best = min(
        total - kept_work(lifetimes, cost, lambda *_, every=float(every): every, devices)
        for every in tried
    )
    assert 0 < lost <= 1.10 * best, lost / best
