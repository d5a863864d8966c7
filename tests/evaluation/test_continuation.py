"""`evaluation/continuation.py`: against the model's own greedy choice, token by token."""

from pathlib import Path

import pytest
import torch

from k2train.data.tokenizer import Tokenizer
from k2train.errors import ConfigError
from k2train.evaluation.continuation import Ending, continue_texts, text_of
from k2train.inference.model import LanguageModel
from k2train.inference.options import Sampling
from k2train.inference.source import Source
from tests.support.tiny_generation import tiny_tokenizer

PROMPTS = [(0, "the cat"), (1, "a dog ran to the cat " * 9), (2, "wer"), (3, "")]


@pytest.fixture(scope="module")
def source(run: Path) -> Source:
    return Source.find(run)


@pytest.fixture(scope="module")
def model(source: Source) -> LanguageModel:
    return LanguageModel(source)


def by_hand(model: LanguageModel, tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    ids = (tokenizer.encode(text) or [2])[-(64 - count) :]
    begun = len(ids)
    for _ in range(count):
        ids.append(int(model.all_logits(torch.tensor(ids))[-1].argmax()))
        if ids[-1] == 2:
            return ids[begun:-1]
    return ids[begun:]


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_end_where_they_must(model: LanguageModel, source: Source, batch: int) -> None:
    """Catches an answer beside another prompt, a stop text that stays, and one that is missed."""
    tokenizer = source.tokenizer
    whole = [text_of(tokenizer, by_hand(model, tokenizer, text, 16)) for _, text in PROMPTS]
    ending = Ending(16)
    assert continue_texts(model, tokenizer, PROMPTS, ending, Sampling(), batch) == whole
    stops = (whole[0][9:12], whole[2][5:7])
    found = continue_texts(model, tokenizer, PROMPTS, Ending(16, stops), Sampling(), batch)
    expected = [text.split(stops[0])[0].split(stops[1])[0] for text in whole]
    assert found == expected and found != whole and all(stop for stop in stops)


def test_draws_do_not_depend_on_the_batch(model: LanguageModel, source: Source) -> None:
    """Catches draws keyed by the place in a batch: other ranks would draw others."""
    way = Sampling(temperature=1.5, seed=3)
    ending = Ending(8)
    one, three = (
        continue_texts(model, source.tokenizer, PROMPTS, ending, way, batch) for batch in (1, 3)
    )
    assert one == three
    again = [(number + 10, text) for number, text in PROMPTS]
    assert continue_texts(model, source.tokenizer, again, ending, way, 3) != one


def test_an_answer_that_fills_the_context(model: LanguageModel, source: Source) -> None:
    """Catches a prompt of which nothing is left."""
    with pytest.raises(ConfigError, match=r"answers of 64 tokens, the context has 64 .*: lower"):
        continue_texts(model, source.tokenizer, PROMPTS, Ending(64), Sampling(), 1)


def test_text_of() -> None:
    """Catches control tokens as text, and a spare id that ends the evaluation."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("the cat")
    assert text_of(tokenizer, [1, *ids, 2, tokenizer.vocab_size + 3]) == "the cat"
