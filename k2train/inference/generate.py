"""Generation: batches of prompts, continued token by token until each one ends.

- The tokens of a prompt do not depend on the prompts beside it, but for rounding.
- An answer ends at the token that ends a document, after `max_tokens`, or at the end of the
  context.
- Ids that the tokenizer does not have, spare rows of the vocabulary, are never chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from k2train.inference.model import LanguageModel
from k2train.inference.options import Limits, Sampling
from k2train.inference.prompts import Prompt
from k2train.inference.sampling import choose

Finish = Literal["end", "max_tokens", "context"]


@dataclass
class Answer:
    """What the model said to a prompt, without the token that ended it."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    finish: Finish | None = None
    """Why it ended; None while it goes on."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    limits: Limits,
    sampling: Sampling | None = None,
    on_token: Callable[[Answer, int], None] = lambda answer, token: None,
) -> list[Answer]:
    """Continue every prompt; collective, with the same arguments and result on every rank.

    `on_token` is called with each token that an answer gains. Raises UserError when the model's
    logits are not finite.
    """
    answers: list[Answer] = []
    for start in range(0, len(prompts), limits.batch_prompts):
        batch = [Answer(one) for one in prompts[start : start + limits.batch_prompts]]
        _continue(model, batch, limits, sampling or Sampling(), on_token)
        answers += batch
    return answers


def _continue(
    model: LanguageModel,
    batch: Sequence[Answer],
    limits: Limits,
    sampling: Sampling,
    on_token: Callable[[Answer, int], None],
) -> None:
    """Continue the prompts of one batch together until the last one ends."""
    lengths = [len(answer.prompt.ids) for answer in batch]
    longest = max(lengths)
    model.start(lengths, min(limits.max_tokens, model.context_tokens - min(lengths)))

    padding = min(limits.stop_ids, default=0)
    rows = [
        [padding] * (longest - n) + list(one.prompt.ids)
        for one, n in zip(batch, lengths, strict=True)
    ]
    tokens = torch.tensor(rows)
    while True:
        logits = model.next_logits(tokens)
        chosen = model.share(len(batch), partial(_next, logits, batch, limits, sampling))
        for answer, token in zip(batch, chosen.tolist(), strict=True):
            _take(answer, token, limits, model.context_tokens, on_token)
        if all(answer.finish for answer in batch):
            return
        # What has ended is continued with any token; nothing looks at it.
        tokens = chosen[:, None]


def _next(
    logits: Tensor | None, batch: Sequence[Answer], limits: Limits, sampling: Sampling
) -> Tensor:
    assert logits is not None, "chosen where the logits are"
    draws = [(answer.prompt.index, len(answer.prompt.ids) + len(answer.ids)) for answer in batch]
    return choose(logits[:, : limits.vocab_size], sampling, draws)


def _take(
    answer: Answer,
    token: int,
    limits: Limits,
    context_tokens: int,
    on_token: Callable[[Answer, int], None],
) -> None:
    if answer.finish is not None:
        return
    if token in limits.stop_ids:
        answer.finish = "end"
        return
    answer.ids.append(token)
    if len(answer.ids) >= limits.max_tokens:
        answer.finish = "max_tokens"
    elif len(answer.prompt.ids) + len(answer.ids) >= context_tokens:
        answer.finish = "context"
    on_token(answer, token)
