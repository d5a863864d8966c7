"""Learning-rate schedules: golden values, end points, and shapes that hold for any numbers."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2train.errors import ConfigError
from k2train.optim.lr_schedule import check_schedule, rate

FIRST = ("cosine", 1.5e-4, 1.5e-5, 2000, 338_760)
SECOND = ("linear", 1e-4, 0.0, 2000, 16_580)


@pytest.mark.parametrize(
    ("step", "value"),
    (
        (1, 7.5e-8),
        (1000, 7.5e-5),
        (2000, 1.5e-4),
        (2001, 1.5e-5 + 1.35e-4 * 0.5 * (1 + math.cos(math.pi / 336_760))),
        (170_380, 8.25e-5),
        (338_760, 1.5e-5),
    ),
)
def test_cosine_of_the_first_stage(step: int, value: float) -> None:
    """Catches a first step at rate 0, a peak one step late, and an end that never reaches the final
    rate.
    """
    assert rate(step, *FIRST) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "value"),
    ((1, 5e-8), (2000, 1e-4), (9290, 5e-5), (16_579, 1e-4 / 14_580), (16_580, 0.0)),
)
def test_linear_of_the_second_stage(step: int, value: float) -> None:
    """Catches a line that ends one step early or late."""
    assert rate(step, *SECOND) == pytest.approx(value, rel=1e-12, abs=1e-20)


@pytest.mark.parametrize(
    ("step", "value"),
    ((1, 0.1), (10, 1.0), (11, 1.0), (80, 1.0), (81, 0.955), (90, 0.55), (100, 0.1)),
)
def test_warmup_stable_decay(step: int, value: float) -> None:
    """Catches a plateau that decays and a decay that starts or ends a step off."""
    assert rate(step, "wsd", 1.0, 0.1, 10, 100, 20) == pytest.approx(value, rel=1e-12)


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    """Catches a constant schedule that bends to `final`."""
    assert [rate(step, "constant", 2.0, 0.5, 4, 8) for step in range(1, 9)] == [
        0.5,
        1.0,
        1.5,
        2,
        2,
        2,
        2,
        2,
    ]


@pytest.mark.parametrize("step", (0, -1, 101))
def test_steps_outside_the_stage_are_our_mistake(step: int) -> None:
    """Catches a step counted from 0, which would run at rate 0."""
    with pytest.raises(AssertionError, match=f"step {step} is outside"):
        rate(step, "linear", 1.0, 0.0, 10, 100)


schedules = st.tuples(
    st.sampled_from(("cosine", "linear", "constant", "wsd")),
    st.floats(1e-6, 1e-2),
    st.floats(0.0, 1.0),
    st.integers(0, 50),
    st.integers(51, 300),
    st.integers(1, 200),
)


@given(schedules)
def test_up_to_the_peak_then_never_up_again(
    schedule: tuple[str, float, float, int, int, int],
) -> None:
    """Catches a jump at the end of warm-up, a rate outside final..peak, a wrong end, and state
    between calls.
    """
    kind, peak, part, warmup, total, decay = schedule
    final, decay = peak * part, min(decay, total - warmup)
    args = (kind, peak, final, warmup, total, decay)
    rates = [rate(step, *args) for step in range(1, total + 1)]
    assert [rate(step, *args) for step in range(total, 0, -1)] == rates[::-1], (
        "a rate depends on what was asked before"
    )
    assert all(a < b for a, b in pairwise(rates[:warmup])), "warm-up must rise"
    tail = rates[max(warmup - 1, 0) :]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(tail)), "after the peak it must not rise"
    assert max(rates) <= peak * (1 + 1e-12)
    assert rates[-1] == pytest.approx(peak if kind == "constant" else final, rel=1e-9, abs=1e-18)
    if warmup:
        assert rates[0] == pytest.approx(peak / warmup, rel=1e-12) and rates[
            warmup - 1
        ] == pytest.approx(peak, rel=1e-12)


def test_what_does_not_fit_is_said_with_its_numbers() -> None:
    """Catches a warm-up as long as the stage, which never reaches its peak."""
    with pytest.raises(
        ConfigError,
        match=r"lr.warmup_steps \(100\) must be less than the steps of the stage \(100\)",
    ):
        check_schedule("cosine", 100, 100, None)
    with pytest.raises(
        ConfigError,
        match=r"lr.warmup_steps \(50\) \+ lr.decay_steps \(51\) must not exceed .* \(100\)",
    ):
        check_schedule("wsd", 50, 100, 51)
    check_schedule("wsd", 50, 100, 50)
    check_schedule("constant", 100, 100, None)
    with pytest.raises(
        ConfigError,
        match=r"lr.warmup_steps \(101\) must not exceed the steps of the stage \(100\)",
    ):
        check_schedule("constant", 101, 100, None)
