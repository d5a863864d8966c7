"""Generated answers: prompts continued until a stop text, an end of document, or a length.

- A prompt keeps its last tokens, so that the answer has its full length within the context.
- The answer ends before the first stop text. Control tokens and spare ids of the vocabulary have
  no text.
- Draws are keyed by seed, number of the prompt and position, so they depend neither on the batch
  nor on the layout.

Source: the rules of truncation and of stop texts are those of lm-eval's `hf` backend.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from pydantic import TypeAdapter

from k2train.data.tokenizer import Tokenizer
from k2train.errors import ConfigError
from k2train.evaluation.divide import divided
from k2train.inference.generate import Answer, generate
from k2train.inference.model import LanguageModel
from k2train.inference.options import Limits, Sampling
from k2train.inference.prompts import Prompt

_FORM: TypeAdapter[list[list[str]]] = TypeAdapter(list[list[str]])


@dataclass(frozen=True)
class Ending:
    """When an answer ends: after so many tokens, or before one of the stop texts."""

    max_tokens: int
    stops: tuple[str, ...] = ()


def continue_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[int, str]],
    ending: Ending,
    sampling: Sampling,
    batch_prompts: int,
) -> list[str]:
    """Return the answer to each prompt (number, text); collective.

    Raises ConfigError when the answer alone would fill the context.
    """
    room = model.context_tokens - ending.max_tokens
    if room < 1:
        raise ConfigError(
            f"a task asks for answers of {ending.max_tokens} tokens, the context has "
            f"{model.context_tokens} (data.sequence_length of the run): lower max_gen_toks of the "
            "task, or leave it out"
        )
    encoded = [
        Prompt(number, text, tuple((tokenizer.encode(text) or [tokenizer.eos_id])[-room:]))
        for number, text in prompts
    ]
    order = sorted(range(len(encoded)), key=lambda place: -len(encoded[place].ids))
    batches = [
        order[start : start + batch_prompts] for start in range(0, len(order), batch_prompts)
    ]
    limits = Limits(
        ending.max_tokens,
        frozenset({tokenizer.eos_id}),
        # Spare rows as in the exported model, where nothing leaves them out.
        model.architecture.vocab_size,
        batch_prompts,
    )
    stop = partial(_stop, tokenizer, ending.stops)

    def answers(batch: Sequence[int]) -> list[str]:
        found = generate(model, [encoded[place] for place in batch], limits, sampling, stop)
        return [_cut(text_of(tokenizer, answer.ids), ending.stops) for answer in found]

    done = divided(model, batches, answers, _FORM)
    texts = {
        place: text
        for batch, found in zip(batches, done, strict=True)
        for place, text in zip(batch, found, strict=True)
    }
    return [texts[place] for place in range(len(encoded))]


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of generated ids, without control tokens and ids that have no text."""
    known = [
        token for token in ids if token < tokenizer.vocab_size and not tokenizer.is_control(token)
    ]
    text = tokenizer.decode(known)
    # The space that begins a text is the tokenizer's, not the answer's.
    return text.removeprefix(" ") if tokenizer.adds_prefix else text


def _stop(tokenizer: Tokenizer, stops: Sequence[str], answer: Answer, token: int) -> None:
    """End an answer whose text has a stop text."""
    if answer.finish is None and stops:
        text = text_of(tokenizer, answer.ids)
        if any(stop in text for stop in stops):
            answer.finish = "end"


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
