"""`evaluation/pass_at_k.py`: catches a biased estimate."""

from itertools import combinations
from statistics import mean, stdev

import pytest

from k2train.errors import UserError
from k2train.evaluation.pass_at_k import check_k, mean_and_error, pass_at_k


def test_it_is_the_share_of_all_choices() -> None:
    """Catches a formula that is not the mean over every choice of k of the n samples."""
    for samples in range(1, 9):
        for correct in range(samples + 1):
            right = [number < correct for number in range(samples)]
            for k in range(1, samples + 1):
                chosen = [any(one) for one in combinations(right, k)]
                assert pass_at_k(samples, correct, k) == pytest.approx(mean(chosen), abs=1e-12)


def test_many_samples() -> None:
    """Catches an overflow, and factors that round away: the product of Chen et al. is the same."""
    samples, correct, k = 5000, 3, 100
    product = 1.0
    for number in range(samples - correct + 1, samples + 1):
        product *= 1 - k / number
    assert pass_at_k(samples, correct, k) == pytest.approx(1 - product, rel=1e-12)


def test_too_few_samples() -> None:
    """Catches pass@10 of five samples."""
    for k in (0, 6):
        with pytest.raises(UserError, match=rf"--k \({k}\) must be from 1 to --samples \(5\)"):
            check_k(5, [1, k])
        with pytest.raises(UserError):
            pass_at_k(5, 2, k)


def test_mean_and_its_error() -> None:
    """Catches an error of one problem instead of the mean's."""
    values = [0.0, 1.0, 0.5, 0.25]
    assert mean_and_error(values) == (mean(values), pytest.approx(stdev(values) / 2))
    assert mean_and_error([0.5]) == (0.5, None)
