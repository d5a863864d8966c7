"""`merge/weights.py`: catches weights that do not sum to 1, and numbers that were mistyped."""

from fractions import Fraction

import pytest

from k2train.errors import UserError
from k2train.merge.weights import Weights


def test_kinds() -> None:
    """Catches linear weights that fall, begin with 0, or are not normalized."""
    assert Weights.parse("mean").of(4) == [0.25] * 4
    found = [Fraction(w).limit_denominator(100) for w in Weights.parse("linear").of(4)]
    assert found == [Fraction(n, 10) for n in (1, 2, 3, 4)] and sum(found) == 1
    assert Weights.parse("0.2,0.3,0.5").of(3) == [0.2, 0.3, 0.5]
    assert Weights.parse("0.333333,0.333333,0.333334").of(3)[2] == 0.333334
    assert Weights.parse("1,3", normalize=True).of(2) == [0.25, 0.75]
    assert Weights.parse("-0.5,1.5", negative=True).of(2) == [-0.5, 1.5]
    assert Weights.parse("1").of(1) == [1.0]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("average", {}, "must be mean, linear, or numbers"),
        ("0.5,", {}, "must be mean, linear, or numbers"),
        ("0.5,0.6", {}, "sum to 1.1, they must sum to 1; divide them by their sum with --normal"),
        ("0.5,0.4999", {}, "sum to 0.9999, they must sum to 1"),
        ("nan,1", {}, "has nan; each must be a finite number"),
        ("inf,1", {"normalize": True}, "has inf; each must be a finite number"),
        ("0,1", {}, "has 0.0; each must be a finite number other than 0"),
        ("-0.5,1.5", {}, "has -0.5: a weight below 0 goes beyond the checkpoints"),
        ("-1,1", {"normalize": True, "negative": True}, "sum to 0, which nothing can be divided"),
        ("1e308,1e308", {"normalize": True}, "sum to inf, which nothing can be divided"),
        ("mean", {"normalize": True}, "mean needs neither --normalize nor --negative"),
    ],
)
def test_mistakes(text: str, options: dict[str, bool], message: str) -> None:
    """Catches a weight that goes into the sum although nobody meant it."""
    with pytest.raises(UserError) as caught:
        Weights.parse(text, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_one_number_for_each() -> None:
    """Catches a weight that is given to another checkpoint, or to none."""
    with pytest.raises(UserError, match="has 2 numbers, --checkpoints has 3 checkpoints"):
        Weights.parse("0.5,0.5").of(3)
