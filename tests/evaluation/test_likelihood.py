"""`evaluation/likelihood.py`: against a softmax over each whole sequence, one at a time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k2train.errors import DataError, UserError
from k2train.evaluation import likelihood
from k2train.evaluation.likelihood import log_likelihoods
from k2train.inference.model import LanguageModel
from k2train.inference.source import Source

Pair = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def model(run: Path) -> LanguageModel:
    # Shorter than the training's, so that short pairs are cut.
    return LanguageModel(replace(Source.find(run), context_tokens=12))


def by_hand(model: LanguageModel, pair: Pair) -> tuple[float, bool]:
    context, continuation = pair
    ids = [*context, *continuation][-13:]
    logits = model.all_logits(torch.tensor(ids[:-1])).double()
    rows = logits[len(ids) - 1 - len(continuation) :]
    wanted = torch.tensor(continuation)
    chosen = rows.log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.sum()), bool((rows.argmax(-1) == wanted).all())


def pairs_of(model: LanguageModel) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    pairs: list[Pair] = []
    for before, after in [(3, 2), (1, 5), (9, 1), (20, 4), (11, 12), (2, 1), (30, 1)]:
        ids = torch.randint(3, 280, (before + after,), generator=generator).tolist()
        pairs.append((ids[:before], ids[before:]))
    # The same input, other ends; and the same tokens, cut at another place.
    pairs += [([5, 6, 7], [8]), ([5, 6, 7], [9]), ([5, 6], [7, 9]), ([5, 6, 7], [8])]
    best = int(model.all_logits(torch.tensor([5, 6, 7]))[-1].argmax())
    return [*pairs, ([5, 6, 7], [best])]


@pytest.mark.parametrize(("batch", "rows"), [(1, 2048), (4, 3), (50, 2048)])
def test_each_pair_has_its_own(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, batch: int, rows: int
) -> None:
    """Catches a target beside its row, a context cut at the wrong end, and padding that is seen."""
    monkeypatch.setattr(likelihood, "ROWS", rows)
    pairs = pairs_of(model)
    found = log_likelihoods(model, pairs, batch)
    for (value, greedy), pair in zip(found, pairs, strict=True):
        expected, best = by_hand(model, pair)
        assert value == pytest.approx(expected, abs=1e-4) and greedy == best
    assert found[-1][1] and not found[7][1]


def test_choices_of_one_token_share_a_pass(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches four passes for the four letters of a question."""
    passes: list[tuple[int, ...]] = []
    hidden = model.hidden

    def counted(tokens: torch.Tensor) -> torch.Tensor | None:
        passes.append(tuple(tokens.shape))
        return hidden(tokens)

    monkeypatch.setattr(model, "hidden", counted)
    log_likelihoods(model, [([5, 6], [n]) for n in range(4)] + [([5, 7, 8], [4])], 8)
    assert passes == [(2, 3)]


def test_what_cannot_be_scored(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the score of a part of a continuation, and one of weights that are NaN."""
    with pytest.raises(DataError, match="continuation of 13 tokens, the context has 12"):
        log_likelihoods(model, [([1], [5] * 13)], 1)
    nothing: list[Pair] = [([], [1]), ([1], [])]
    for pair in nothing:
        with pytest.raises(DataError, match="likelihood of nothing"):
            log_likelihoods(model, [pair], 1)
    assert log_likelihoods(model, [], 1) == []
    nan = torch.full((1, 320), float("nan"))
    monkeypatch.setattr(model.stage, "logits_at", lambda *_: nan)
    with pytest.raises(UserError, match="logits are not finite"):
        log_likelihoods(model, [([1], [5])], 1)
