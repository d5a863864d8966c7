"""The baseline against medians computed plainly.

Would catch a binary search that is one element off, and a curve that falls under a wide window.
"""

import math
import random
from itertools import pairwise
from statistics import median

from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.guard.robust_baseline import ARMED_AT, MAD_TO_SD, NEWEST, baseline

NUMBERS = st.floats(-1e6, 1e6) | st.sampled_from((0.0, 1.0, -1.0, 2.5))
SERIES = st.integers(0, 99).map(
    lambda seed: [
        random.Random(seed).gauss(0, 1) ** 3 for _ in range(random.Random(seed).randint(64, 256))
    ]
)


def plain(values: list[float], floor: float) -> tuple[float, float]:
    """The same by its definition."""
    center = median(values)
    sd = max(MAD_TO_SD * median(abs(value - center) for value in values), floor)
    newest = median(values[-NEWEST:])
    steps = [abs(b - a) for a, b in pairwise(values[-ARMED_AT:])]
    noise = max(MAD_TO_SD * median(steps) / math.sqrt(2.0), floor)
    if newest < center - 0.75 * sd or (newest < center - 0.25 * sd and sd > 2 * noise):
        return newest, min(sd, noise)
    return center, sd


@settings(max_examples=50, deadline=None)
@given(
    values=SERIES | st.lists(NUMBERS, min_size=64, max_size=80), floor=st.sampled_from((1e-3, 0.05))
)
def test_it_equals_the_plain_definition_to_the_bit(values: list[float], floor: float) -> None:
    level = baseline(values, floor)
    assert level is not None and (level.median, level.sd) == plain(values, floor)


def test_there_is_none_before_there_are_enough_values() -> None:
    assert baseline([1.0] * (ARMED_AT - 1), 0.1) is None
    assert baseline([1.0] * ARMED_AT, 0.1) is not None


def test_a_falling_curve_has_the_baseline_of_its_newest_part() -> None:
    """Catches a spike of a nat that hides in the width of a curve that falls a nat."""
    noise = random.Random(1)
    values = [8.0 - 0.02 * step + noise.gauss(0, 0.03) for step in range(256)]
    level = baseline(values, 1e-3)
    assert level is not None and level.z(values[-1] + 1.0) > 7 > level.z(values[-1])
    assert level.median > values[-1], "it must not promise that the fall goes on"


def test_a_curve_that_flattens_has_the_baseline_of_its_newest_part() -> None:
    """Catches rows of noise that hide in the first 240 steps of a training.

    A run over real text: 6.9 nat at first, 4.0 at last, noise of 0.2. Ids that were shuffled came
    in at 7.1 and raised no alarm, 3.4 spreads above what was called usual.
    """
    noise = random.Random(1)
    for steps in (120, 180, 240):
        curve = [3.6 + 3.3 / (1 + step / 40) + noise.gauss(0, 0.2) for step in range(steps)]
        level = baseline(curve, 1e-3)
        assert level is not None and level.sd < 0.4, (steps, level)
        assert level.z(7.1) > 7 > level.z(max(curve[-NEWEST:]))
