"""Loss-spike detection and the count of non-finite steps.

Would catch alarms on a clean curve, a spike that hides itself in its own window, a verdict that
depends on a restart, and NaN that poisons the baseline.
"""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from k2train.guard.nonfinite import NonFiniteCounter
from k2train.guard.spike_verdict import SpikeVerdict
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


def _events(alert: SpikeAlert, series: Series, first_step: int = 1) -> list[SpikeVerdict]:
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
    assert [(event.kind, event.step) for event in events] == [
        ("opened", 401),
        ("malignant", 500),
    ]
    opened, verdict = events
    assert (opened.loss_z or 0) > 7 and verdict.onset == 401 and verdict.steps == 100
    assert (verdict.peak_loss or 0) > 3.4 and (verdict.quiet_share or 0) > 0.1
    assert opened.channels == ("loss",)
    # The run goes on up there, and the next spike on top of it is seen again.
    events = _events(
        alert, _raised(clean[500:600], 0.5, 1.3) + _raised(clean[600:601], 2.0, 1.0), 501
    )
    assert [(event.kind, event.step) for event in events] == [("opened", 601)]


def test_a_short_spike_is_benign() -> None:
    clean = _clean(600)
    series = clean[:300] + _raised(clean[300:306], 1.0, 20.0) + clean[306:]
    events = _events(SpikeAlert(), series)
    assert [event.kind for event in events] == ["opened", "benign"]
    assert events[0].step == 301 and 320 <= events[1].step <= 330
    assert events[1].onset == 301
    alert = SpikeAlert()
    _events(alert, series[:300])
    before = asdict(alert)
    _events(alert, series[300:306], 301)
    assert alert.losses == before["losses"], "the window must not take the spike in"
    assert alert.log_grads == before["log_grads"]


def test_a_peak_of_exactly_one_stays_the_peak() -> None:
    """Catches a logarithm of 0 that is taken for no value; logs of other tools are rounded."""
    clean = _clean(400)
    spike = [(5.0, 1.0), (5.0, 0.3), (5.0, 0.2)]
    closing = _events(SpikeAlert(), clean[:300] + spike + clean[303:])[-1]
    assert (closing.kind, closing.peak_grad_norm) == ("benign", 1.0)


def test_a_jump_of_the_gradient_norm_alone_opens() -> None:
    clean = _clean(101)
    alert = SpikeAlert()
    (event,) = _events(alert, clean[:100] + _raised(clean[100:], 0.0, 30.0))
    assert event.kind == "opened" and (event.grad_norm_z or 0) > 8 > (event.loss_z or 9)
    assert event.channels == ("grad_norm",)
    assert alert.open_since == 101


def test_a_small_lasting_shift_is_a_level_and_becomes_the_baseline() -> None:
    # Spread evenly over 3.00 +- 0.02: half of it beyond 0.01, an sd of 0.0148. One outlier opens;
    # then 2.5 sd up: neither back nor broken.
    even = [(2.98 + 0.04 * (step * 0.6180339887 % 1), 1.0) for step in range(900)]
    alert = SpikeAlert()
    events = _events(
        alert, even[:300] + _raised(even[300:301], 1.0, 1.0) + _raised(even[301:], 0.037, 1.0)
    )
    assert [event.kind for event in events] == ["opened", "level"] and events[1].step == 400
    assert alert.open_since is None


def test_nothing_is_judged_before_64_steps() -> None:
    for before, expected in ((63, []), (64, ["opened"])):
        clean = _clean(before + 1)
        events = _events(SpikeAlert(), clean[:before] + _raised(clean[before:], 3.0, 1.0))
        assert [event.kind for event in events] == expected


def test_a_flat_curve_has_a_floor_under_its_deviation() -> None:
    flat = [(2.0, 1.0)] * 100
    assert _events(SpikeAlert(), [*flat, (2.006, 1.0)]) == []
    assert [event.kind for event in _events(SpikeAlert(), [*flat, (2.008, 1.0)])] == ["opened"]


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
    if not height and not 290 < cut <= 300:
        # A start alone moves no baseline.
        second.attempt_began(1 + cut)
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


def _plain(series: Series) -> list[tuple[str, int]]:
    """Alarms and their ends by the definition: plain medians, nothing kept from step to step."""
    found: list[tuple[str, int]] = []
    losses: list[float] = []
    norms: list[float] = []
    usual: list[tuple[float, float]] | None = None
    since, opened = 0, 0
    event: list[float] = []
    for step, (loss, norm) in enumerate(series, 1):
        if opened:
            event.append(loss)
            center, sd = usual[0] if usual else (0.0, 1.0)
            if len(event) >= 20 and median(event[-20:]) <= center + 2 * sd:
                found.append(("benign", step))
                opened, event, usual, since = 0, [], None, 0
            continue
        if usual is None and len(losses) >= 64:
            usual, since = [_spread(losses[-256:], 1e-3), _spread(norms[-256:], 0.05)], 0
        if usual is not None:
            z = [(x - m) / sd for x, (m, sd) in zip((loss, math.log(norm)), usual, strict=True)]
            if z[0] > 7 or z[1] > 8:
                found.append(("opened", step))
                opened, event = step, [loss]
                continue
        losses.append(loss)
        norms.append(math.log(norm))
        since += 1
        if usual is not None and since == 16:
            usual = None
    return found


def _spread(values: list[float], floor: float) -> tuple[float, float]:
    center = median(values)
    return center, max(1.4826 * median(abs(value - center) for value in values), floor)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), blips=st.lists(st.integers(70, 550), max_size=4))
def test_alarms_are_those_of_plain_medians(seed: int, blips: list[int]) -> None:
    """Catches a window, a median or an update of the baseline that is one step off."""
    noise = random.Random(seed)
    series = [
        (
            2.0 + 0.02 * noise.gauss(0, 1) * (4 if noise.random() < 0.01 else 1) + (step in blips),
            math.exp(noise.gauss(0, 0.12)),
        )
        for step in range(600)
    ]
    found = [(event.kind, event.step) for event in _events(SpikeAlert(), series)]
    assert found == _plain(series)


@pytest.mark.parametrize("late", (0, 1, 7, 8))
def test_an_alarm_in_the_first_steps_of_an_attempt_is_a_restart(late: int) -> None:
    """Catches data that is blamed for a checkpoint that was loaded without its moments."""
    clean = _clean(700)
    alert = SpikeAlert()
    _events(alert, clean[:400])
    alert.attempt_began(401)
    broken = clean[400 : 400 + late] + _raised(clean[400 + late : 600], 9.0, 1.0)
    events = _events(alert, broken, 401)
    expected = ["restart", "level"] if late < 8 else ["opened", "malignant"]
    assert [event.kind for event in events] == expected
    assert events[0].onset == 401 + late and [e.in_restart for e in events] == [False, late < 8]
    assert ("in_restart" in events[1].row()) == (late < 8)


def test_a_small_rise_of_all_first_losses_is_a_restart() -> None:
    """Catches a loss of state that lifts no single step above the noise."""
    clean = _clean(700)
    alert = SpikeAlert()
    _events(alert, clean[:400])
    alert.attempt_began(401)
    (event,) = _events(alert, _raised(clean[400:416], 0.07, 1.0), 401)
    assert (event.kind, event.onset, event.step) == ("restart", 401, 416)


@pytest.mark.parametrize("seed", range(3))
def test_starts_again_and_again_raise_no_alarm(seed: int) -> None:
    alert, clean = SpikeAlert(), _clean(5000, seed)
    for first in range(0, 5000, 100):
        alert.attempt_began(first + 1)
        assert _events(alert, clean[first : first + 100], first + 1) == []


def test_would_open_is_what_observe_does_and_changes_nothing() -> None:
    """Catches a step that is done again although no alarm follows, or is not although one does."""
    clean = _clean(500)
    series = clean[:300] + _raised(clean[300:304], 1.0, 10.0) + clean[304:]
    alert = SpikeAlert()
    for step, row in enumerate(series, 1):
        before = json.dumps(asdict(alert))
        asked, outlier = alert.would_open(*row), alert.is_outlier(*row)
        assert json.dumps(asdict(alert)) == before
        opened = [event.kind for event in alert.observe(step, *row)] == ["opened"]
        assert asked == opened and outlier == (301 <= step <= 304)
    assert not alert.would_open(math.nan, 1.0) and not alert.is_outlier(2.0, math.inf)


def test_the_update_norm_is_a_channel_of_its_own() -> None:
    """Catches moments that were lost: the update is too large before the loss knows."""
    alert = SpikeAlert()
    for step, row in enumerate(_clean(200), 1):
        assert alert.observe(step, *row, 0.5) == []
    (event,) = alert.observe(201, 3.0, math.exp(-1.0), 1.5)
    assert event.channels == ("update_norm",) and (event.update_norm_z or 0) > 8
    assert event.row()["usual_update_norm"] == pytest.approx(0.5)


def test_a_series_may_have_losses_alone() -> None:
    clean = [loss for loss, _ in _clean(600)]
    alert = SpikeAlert()
    events = [e for step, loss in enumerate(clean[:400], 1) for e in alert.observe(step, loss)]
    events += [
        e for step, loss in enumerate(clean[400:], 401) for e in alert.observe(step, loss + 1)
    ]
    assert [event.kind for event in events] == ["opened", "malignant"]
    assert events[1].peak_grad_norm is events[1].quiet_share is None


def test_a_norm_that_stays_high_becomes_usual() -> None:
    """Catches an alarm every 20 steps for the rest of a run whose loss never moved."""
    clean = _clean(2000)
    events = _events(SpikeAlert(), clean[:400] + _raised(clean[400:], 0.0, 3.0))
    assert [event.kind for event in events] == ["opened", "benign"]


def test_a_spike_on_a_steep_curve_is_seen() -> None:
    noise = random.Random(3)
    steep = [(4 + 6 * math.exp(-step / 200) + noise.gauss(0, 0.03), 2.0) for step in range(500)]
    series = steep[:250] + _raised(steep[250:256], 1.0, 1.0) + steep[256:]
    assert [(e.kind, e.onset) for e in _events(SpikeAlert(), series)] == [
        ("opened", 251),
        ("benign", 251),
    ]


@pytest.mark.parametrize(
    ("rise", "kind"),
    (
        (lambda after: math.exp(-after / 60), "benign"),
        (lambda after: 0.5 * (after < 92), "benign"),
        (lambda after: 0.3 + math.exp(-after / 5), "malignant"),
        (lambda after: 0.5 * math.exp(-after / 1000), "malignant"),
        (lambda after: 4.0 * math.exp(-after / 5) - 2.5 * (after > 10), "malignant"),
    ),
    ids=("decays", "just back", "stays", "decays slowly", "far too low"),
)
def test_a_loss_on_its_way_back_is_waited_for(rise: Callable[[int], float], kind: str) -> None:
    """Catches a rollback of what heals by itself, and waiting for what does not."""
    clean = _clean(1000)
    rising = [(loss + rise(after), norm) for after, (loss, norm) in enumerate(clean[400:])]
    opened, verdict = _events(SpikeAlert(), clean[:400] + rising)[:2]
    assert opened.step == 401 and verdict.kind == kind
    assert kind == "benign" or verdict.steps == 100


def test_the_onset_is_the_first_raised_step_before_the_alarm() -> None:
    even = [(3.0 + 0.02 * (step % 3 - 1), 1.0) for step in range(300)]
    series = [*even, (3.11, 1.0), (3.15, 1.0), (3.9, 1.0)]
    (event,) = _events(SpikeAlert(), series)
    assert (event.kind, event.onset, event.step) == ("opened", 301, 303)


def test_a_state_from_before_these_keys_loads() -> None:
    """Older checkpoints have the windows and the event alone."""
    old = {"losses": [3.0] * 100, "log_grads": [0.0] * 100, "open": None}
    alert = RESTORED.validate_python(old)
    assert [e.kind for e in alert.observe(101, 9.0, 1.0)] == ["opened"]
    center = {"loss": 3.0, "loss_sd": 0.1, "log_grad": 0.0, "log_grad_sd": 0.1}
    event = {"onset": 90, "center": center, "losses": [9.0], "log_grads": [0.0], "count": 1}
    event |= {"quiet": 1, "peak_loss": 9.0, "peak_log_grad": 0.0}
    alert = RESTORED.validate_python(old | {"open": event})
    assert alert.open_since == 90 and not alert.would_open(9.0, 1.0)


def test_drift_is_told_on_the_console_in_one_line() -> None:
    noise = random.Random(0)
    losses = [3.0 + max(0, step - 2000) * 5e-4 + noise.gauss(0, 0.02) for step in range(3000)]
    (event,) = _events(SpikeAlert(), [(loss, 1.0) for loss in losses])
    assert event.kind == "drift" and 2000 < event.onset < event.step
    assert re.fullmatch(
        r"loss drift at step \d+: [\d.]+ -> [\d.]+ since about step \d+, without a jump",
        event.sentence(3.2, 1.0),
    )
