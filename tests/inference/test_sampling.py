"""`inference/sampling.py`: catches tokens that are drawn too often or too rarely, a top-k or top-p
that keeps others than transformers does, and draws that follow a pattern.
"""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from k2train.errors import UserError
from k2train.inference.options import Sampling
from k2train.inference.sampling import choose, probabilities, uniform

WAYS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (0.9, 0, 0.8), (1.1, 7, 0.6), (0.5, 1, 0.1)]


def logits(vocab: int = 12, rows: int = 1) -> torch.Tensor:
    """Logits of which the first is the largest: at the ends a draw is most easily wrong."""
    drawn = 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(4))
    drawn[:, 0] = drawn.max(dim=1).values + 0.5
    drawn[:, -1] = drawn[:, 0] - 0.2
    return drawn


def warped(scores: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities by the processors of transformers, in its order."""
    ids = torch.zeros(len(scores), 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(temperature)(ids, scores.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return scores.softmax(dim=-1)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), WAYS)
def test_the_distribution_is_that_of_transformers(
    temperature: float, top_k: int, top_p: float
) -> None:
    """Catches another order of the three, and a bound that is one token off."""
    scores = logits(200, rows=20)
    found = probabilities(scores, Sampling(temperature, top_k, top_p))
    expected = warped(scores, temperature, top_k, top_p)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), WAYS[:5])
def test_tokens_are_drawn_as_often_as_they_should_be(
    temperature: float, top_k: int, top_p: float
) -> None:
    """Catches a draw that is not by the probabilities.

    Chi-square of 20,000 draws, whose keys are fixed; the bound is that of one wrong verdict in a
    million, at most.
    """
    draws = 20_000
    scores, sampling = logits(), Sampling(temperature, top_k, top_p, seed=9)
    keys = [(number % 100, number // 100) for number in range(draws)]
    found = choose(scores.expand(draws, -1), sampling, keys).bincount(minlength=scores.shape[1])

    expected = warped(scores, temperature, top_k, top_p)[0] * draws
    kept = expected > 0
    assert not found[~kept].any()
    square = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    # Wilson and Hilferty's normal approximation of chi-square, at 4.9 standard deviations.
    freedom = max(1, int(kept.sum()) - 1)
    part = 2 / (9 * freedom)
    assert square < freedom * (1 - part + 4.9 * part**0.5) ** 3


def test_greedy_takes_the_first_of_the_largest() -> None:
    """Catches a temperature of 0 that is drawn."""
    scores = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert choose(scores, Sampling(), [(0, 0), (1, 0)]).tolist() == [1, 0]


def test_each_part_of_a_key_counts() -> None:
    """Catches draws that repeat from prompt to prompt, position to position or seed to seed."""
    keys = [(seed, prompt, at) for seed in range(3) for prompt in range(30) for at in range(30)]
    numbers = [uniform(*key) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert 0 <= min(numbers) < 0.01 and 0.99 < max(numbers) < 1


def test_what_is_not_a_number_is_refused() -> None:
    """Catches a broken model that says token 0 for ever."""
    with pytest.raises(UserError, match="NaN"):
        choose(torch.tensor([[0.0, float("nan")]]), Sampling(), [(0, 0)])
