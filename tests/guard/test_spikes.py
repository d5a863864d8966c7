"""Loss-spike detection and the count of non-finite steps.

Would catch alarms on a clean curve, a spike that hides itself in its own window, a verdict that
depends on a restart, and NaN that poisons the baseline.
"""

import json
import math
import random
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from k2train.guard.nonfinite import NonFiniteCounter
from k2train.guard.spikes import SpikeAlert

Series = list[tuple[float, float]]
RESTORED = TypeAdapter(SpikeAlert)
"""How a checkpoint's state becomes an alert again."""


def _clean(steps: int, seed: int = 0, level: float = 3.0) -> Series:
    noise = random.Random(seed)
    return [
        (level - 0.3 * step / 10_000 + noise.gauss(0, 0.02), math.exp(noise.gauss(-1.0, 0.12)))
        for step in range(steps)
    ]


def _raised(series: Series, by: float, norm: float) -> Series:
    return [(loss + by, grad_norm * norm) for loss, grad_norm in series]


def _events(alert: SpikeAlert, series: Series, first_step: int = 1) -> list[dict[str, object]]:
    return [
        event
        for offset, row in enumerate(series)
        for event in alert.observe(first_step + offset, *row)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_clean_steps_raise_no_alarm(seed: int) -> None:
    assert _events(SpikeAlert(), _clean(10_000, seed)) == []


def test_the_steep_start_of_a_run_raises_no_alarm() -> None:
    noise = random.Random(1)
    series = [(3 + 7 * math.exp(-step / 60) + noise.gauss(0, 0.03), 2.0) for step in range(600)]
    assert _events(SpikeAlert(), series) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_lasting_spike_opens_at_its_onset_and_is_malignant_within_100_steps(seed: int) -> None:
    clean = _clean(1000, seed)
    alert = SpikeAlert()
    events = _events(alert, clean[:400] + _raised(clean[400:500], 0.5, 1.3))
    assert [(event["kind"], event["step"]) for event in events] == [
        ("opened", 401),
        ("malignant", 500),
    ]
    opened, verdict = events
    assert float(str(opened["loss_z"])) > 7 and verdict["onset"] == 401 and verdict["steps"] == 100
    assert float(str(verdict["peak_loss"])) > 3.4 and float(str(verdict["quiet_share"])) > 0.1
    assert json.loads(json.dumps(events)) == events
    # The run goes on up there, and the next spike on top of it is seen again.
    events = _events(
        alert, _raised(clean[500:600], 0.5, 1.3) + _raised(clean[600:601], 2.0, 1.0), 501
    )
    assert [(event["kind"], event["step"]) for event in events] == [("opened", 601)]


def test_a_short_spike_is_benign() -> None:
    clean = _clean(600)
    series = clean[:300] + _raised(clean[300:306], 1.0, 20.0) + clean[306:]
    events = _events(SpikeAlert(), series)
    assert [event["kind"] for event in events] == ["opened", "benign"]
    assert events[0]["step"] == 301 and 320 <= int(str(events[1]["step"])) <= 330
    assert events[1]["onset"] == 301
    alert = SpikeAlert()
    _events(alert, series[:300])
    before = asdict(alert)
    _events(alert, series[300:306], 301)
    assert alert.losses == before["losses"], "the window must not take the spike in"
    assert alert.log_grads == before["log_grads"]


def test_a_jump_of_the_gradient_norm_alone_opens() -> None:
    clean = _clean(101)
    alert = SpikeAlert()
    (event,) = _events(alert, clean[:100] + _raised(clean[100:], 0.0, 30.0))
    assert event["kind"] == "opened" and float(str(event["grad_norm_z"])) > 8 > float(
        str(event["loss_z"])
    )
    assert alert.open_since == 101


def test_a_small_lasting_shift_is_a_level_and_becomes_the_baseline() -> None:
    # Spread evenly over 3.00 +- 0.02: half of it beyond 0.01, an sd of 0.0148. One outlier opens;
    # then 2.5 sd up: neither back nor broken.
    even = [(2.98 + 0.04 * (step * 0.6180339887 % 1), 1.0) for step in range(900)]
    alert = SpikeAlert()
    events = _events(
        alert, even[:300] + _raised(even[300:301], 1.0, 1.0) + _raised(even[301:], 0.037, 1.0)
    )
    assert [event["kind"] for event in events] == ["opened", "level"] and events[1]["step"] == 400
    assert alert.open_since is None


def test_nothing_is_judged_before_64_steps() -> None:
    for before, expected in ((63, []), (64, ["opened"])):
        clean = _clean(before + 1)
        events = _events(SpikeAlert(), clean[:before] + _raised(clean[before:], 3.0, 1.0))
        assert [event["kind"] for event in events] == expected


def test_a_flat_curve_has_a_floor_under_its_deviation() -> None:
    flat = [(2.0, 1.0)] * 100
    assert _events(SpikeAlert(), [*flat, (2.006, 1.0)]) == []
    assert [event["kind"] for event in _events(SpikeAlert(), [*flat, (2.008, 1.0)])] == ["opened"]


@pytest.mark.parametrize(
    "bad", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (3.0, -math.inf)]
)
def test_values_that_are_not_finite_are_ignored(bad: tuple[float, float]) -> None:
    clean = _clean(200)
    with_bad, without = SpikeAlert(), SpikeAlert()
    series = [row for good in clean for row in (good, bad)]
    assert _events(with_bad, series) == [] == _events(without, clean)
    assert with_bad == without


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 460), seed=st.integers(0, 5), height=st.sampled_from([0.0, 0.06, 0.5]))
def test_a_restart_anywhere_changes_nothing(cut: int, seed: int, height: float) -> None:
    clean = _clean(460, seed)
    series = clean[:300] + _raised(clean[300:303], 1.0, 10.0) + _raised(clean[303:], height, 1.0)
    straight = SpikeAlert()
    expected = _events(straight, series)
    first = SpikeAlert()
    events = _events(first, series[:cut])
    second = RESTORED.validate_python(json.loads(json.dumps(asdict(first), allow_nan=False)))
    _events(first, clean)
    events += _events(second, series[cut:], 1 + cut)
    assert events == expected and second == straight


def test_state_is_a_copy() -> None:
    alert = SpikeAlert()
    clean = _clean(200)
    _events(alert, clean[:100] + _raised(clean[100:105], 1.0, 1.0))
    before = asdict(alert)
    text = json.dumps(before)
    _events(alert, clean[105:], 106)
    assert json.dumps(before) == text


def test_three_non_finite_steps_in_a_row_stop() -> None:
    counter = NonFiniteCounter()
    answers = [
        counter.observe(finite) for finite in (True, False, False, True, False, False, False, False)
    ]
    assert answers == ["apply", "skip", "skip", "apply", "skip", "skip", "stop", "stop"]
    assert counter.total == 6


def test_a_restart_does_not_forget_the_steps_before_it() -> None:
    counter = NonFiniteCounter()
    counter.observe(False)
    counter.observe(False)
    again = NonFiniteCounter(**json.loads(json.dumps(asdict(counter))))
    assert again.observe(False) == "stop" and again.total == 3
