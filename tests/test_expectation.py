"""Expectations in words: what is understood, what is refused, and what meets them."""

import pytest

from k2train.expectation import GRAMMAR, parse_expectation


@pytest.mark.parametrize(
    ("text", "measure", "steps", "met", "missed"),
    (
        ("held-out loss under 2.1 within 200 steps", "held-out loss", 200, 2.0999, 2.1),
        ("loss over 3 within 1 step", "loss", 1, 3.001, 3.0),
        ("gradient norm within 0.5 to 1e1 within 20 steps", "gradient norm", 20, 10.0, 10.1),
        ("  loss   under 2 within 7 steps ", "loss", 7, 1.0, float("nan")),
        ("loss within 0 to 2 within 7 steps", "loss", 7, 0.0, float("nan")),
    ),
)
def test_the_three_forms(text: str, measure: str, steps: int, met: float, missed: float) -> None:
    """Catches a bound on the wrong side, one that counts itself in, and NaN that meets anything."""
    found = parse_expectation(text)
    assert (found.measure, found.steps) == (measure, steps)
    assert found.is_met_by(met) and not found.is_met_by(missed)
    assert parse_expectation(found.text) == found and "  " not in found.text


@pytest.mark.parametrize(
    "text",
    (
        "it gets better",
        "loss under 2.1",
        "loss under 2.1 within 200",
        "loss under -2.1 within 200 steps",
        "loss under 2.1 within 0 steps",
        "loss under 1e999 within 2 steps",
        "loss within 3 to 2 within 200 steps",
        "held-out loss below 2.1 within 200 steps",
        "loss under 2.1 within 200 steps, I hope",
    ),
)
def test_anything_else_is_refused(text: str) -> None:
    """Catches words that nobody would ever measure."""
    with pytest.raises(ValueError, match=r"^must ") as refused:
        parse_expectation(text)
    assert "\n" not in str(refused.value)
    if text == "it gets better":
        assert GRAMMAR in str(refused.value)
