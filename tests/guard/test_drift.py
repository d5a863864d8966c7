"""Slow rises of the loss: found, told once, and not made up from noise.

Would catch a rule that needs a jump, one that warns of noise or of a falling curve, and one that
repeats itself at each block.
"""

import json
import random
from dataclasses import asdict

import pytest
from pydantic import TypeAdapter

from k2train.guard.drift import Drift, Rise

SD = 0.02


def rises(losses: list[float], drift: Drift | None = None) -> list[tuple[int, Rise]]:
    drift = drift or Drift()
    found = [(step, drift.observe(step, loss, SD)) for step, loss in enumerate(losses, 1)]
    return [(step, rise) for step, rise in found if rise is not None]


def noisy(levels: list[float], seed: int = 0) -> list[float]:
    noise = random.Random(seed)
    return [level + noise.gauss(0, SD) for level in levels]


@pytest.mark.parametrize("seed", range(3))
def test_a_rise_of_half_a_nat_in_4000_steps_is_told_once(seed: int) -> None:
    levels = [3.21] * 3000 + [3.21 + 0.47 * step / 4000 for step in range(4000)]
    ((step, rise),) = rises(noisy(levels, seed))
    assert 3000 < rise.since < step < 4000 and rise.since < 3600
    assert 3.2 < rise.usual_loss < 3.22 < rise.recent_loss < 3.4


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_a_falling_curve_are_no_rise(seed: int) -> None:
    assert rises(noisy([3.0] * 30_000, seed)) == []
    assert rises(noisy([3.0 - 1e-4 * step for step in range(10_000)], seed)) == []


def test_a_rise_that_goes_away_can_be_told_again() -> None:
    there = [3.0] * 2000 + [3.0 + 2e-4 * step for step in range(1000)]
    found = rises(noisy([*there, *([3.0] * 3000), *there[2000:]]))
    assert len(found) == 2 and found[1][0] > 6000


def test_a_restart_changes_nothing() -> None:
    losses = noisy([3.0] * 1500 + [3.0 + 5e-4 * step for step in range(1500)])
    straight, first = Drift(), Drift()
    expected = rises(losses, straight)
    assert expected
    for step, loss in enumerate(losses[:1777], 1):
        first.observe(step, loss, SD)
    second = TypeAdapter(Drift).validate_python(json.loads(json.dumps(asdict(first))))
    found = [second.observe(step, loss, SD) for step, loss in enumerate(losses[1777:], 1778)]
    assert [one for one in found if one] == [rise for _, rise in expected] and second == straight
