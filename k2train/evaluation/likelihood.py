"""Log-likelihoods of continuations: what a model gives to tokens after a context, in batches.

- What does not fit into the context loses its begin. The last token of a continuation is never an
  input, so context and continuation may have one token more than the context.
- Continuations after the same input share a pass: the choices of one token of a question do.
- Inputs of a batch are padded on the right. Attention is causal, so padding changes nothing, and
  no mask is needed.
- Logits exist only for the positions of continuations, and of so many at a time.
- With pipeline parallelism the last stage scores, and all ranks of its replica get the scores.

Source: the rules of truncation and of the greedy flag are those of lm-eval's `hf` backend.

Alternatives considered:
- Logits of whole batches: 8 windows of 2,048 positions and 32,032 tokens are 2 GB.
- Several batches in the pipeline at once: a model for generation has the caches of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from pydantic import TypeAdapter

from k2train.errors import DataError, UserError
from k2train.evaluation.divide import divided
from k2train.inference.model import LanguageModel

ROWS = 2048
"""Positions whose logits exist at a time."""
Ids = tuple[int, ...]
Score = tuple[float, bool]
_FORM: TypeAdapter[list[list[Score]]] = TypeAdapter(list[list[Score]])


@dataclass
class _Input:
    """Tokens of a pass, and the continuations that end behind it: number and ids of each."""

    ids: Ids
    wanted: list[tuple[int, Ids]] = field(default_factory=list)

    @property
    def positions(self) -> int:
        return max(len(ids) for _, ids in self.wanted)


def log_likelihoods(
    model: LanguageModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_inputs: int
) -> list[Score]:
    """Return log-likelihood (natural) and greedy flag of each (context, continuation); collective.

    The flag says whether every token is the most likely one. Raises DataError for a continuation
    that is empty or longer than the context, UserError when the model's logits are not finite.
    """
    inputs = _inputs(model.context_tokens, pairs)
    batches = [
        inputs[start : start + batch_inputs] for start in range(0, len(inputs), batch_inputs)
    ]
    found = divided(model, batches, lambda batch: _score(model, batch), _FORM)

    scores: dict[int, Score] = {}
    for batch, values in zip(batches, found, strict=True):
        numbers = [number for one in batch for number, _ in one.wanted]
        scores |= dict(zip(numbers, values, strict=True))
    return [scores[number] for number in range(len(pairs))]


def _inputs(
    context_tokens: int, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[_Input]:
    """Return the passes that are needed, longest first: the first batch needs the most memory."""
    found: dict[Ids, _Input] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise DataError("a task asks for the likelihood of nothing, or after nothing")
        if len(continuation) > context_tokens:
            raise DataError(
                f"a task has a continuation of {len(continuation)} tokens, the context has "
                f"{context_tokens} (data.sequence_length of the run): leave this task out"
            )
        # The whole key, not what is left of it: equal ends of two contexts are equal inputs.
        ids = tuple([*context, *continuation][-(context_tokens + 1) :][:-1])
        found.setdefault(ids, _Input(ids)).wanted.append((number, tuple(continuation)))
    return sorted(found.values(), key=lambda one: (-len(one.ids), one.ids))


@torch.inference_mode()
def _score(model: LanguageModel, batch: Sequence[_Input]) -> list[Score]:
    """Score the continuations of one batch; collective over the ranks of a replica."""
    longest = len(batch[0].ids)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, one in zip(tokens, batch, strict=True):
        row[: len(one.ids)] = torch.tensor(one.ids)
    model.start([longest] * len(batch), 0)
    hidden = model.hidden(tokens)

    # Exactly as they are: the bits of fp64 numbers, and 0 or 1.
    count = sum(len(one.wanted) for one in batch)
    shared = model.share(2 * count, lambda: _score_hidden(model, batch, hidden))
    values, best = shared[:count].view(torch.float64), shared[count:].bool()
    return list(zip(values.tolist(), best.tolist(), strict=True))


def _score_hidden(
    model: LanguageModel, batch: Sequence[_Input], hidden: torch.Tensor | None
) -> torch.Tensor:
    """Scores of a batch as int64 [2 * n]: log-likelihoods (bits of fp64), then greedy flags.

    `hidden` [s, b, h] is the output of the last stage.
    """
    assert hidden is not None, "scored where the last stage is"
    # One row for each position that a continuation needs; its targets point at rows.
    parts, rows, targets, lengths = [], list[int](), list[int](), list[int]()
    first = 0
    for index, one in enumerate(batch):
        stop = len(one.ids)
        parts.append(hidden[stop - one.positions : stop, index])
        first += one.positions
        for _, ids in one.wanted:
            rows += range(first - len(ids), first)
            targets += ids
            lengths.append(len(ids))
    values, best = _of_targets(model, torch.cat(parts), torch.tensor(rows), torch.tensor(targets))

    sums = torch.stack([value.sum() for value in values.split(lengths)])
    flags = torch.stack([flag.all() for flag in best.split(lengths)])
    return torch.cat([sums.view(torch.int64), flags.long()])


def _of_targets(
    model: LanguageModel, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability (fp64) and greedy flag of each target, on the host.

    `hidden` [n, h]; `rows` and `targets` [m] say after which row each target comes.
    """
    values = torch.empty(len(targets), dtype=torch.float64)
    best = torch.empty(len(targets), dtype=torch.bool)
    for start in range(0, len(hidden), ROWS):
        part = hidden[start : start + ROWS]
        logits = model.stage.logits_at(part[:, None], range(len(part)))
        inside = (rows >= start) & (rows < start + len(part))
        own, wanted = (rows[inside] - start).to(part.device), targets[inside].to(part.device)
        chosen = logits.log_softmax(dim=-1)[own, wanted]
        values[inside] = chosen.double().cpu()
        best[inside] = (logits.argmax(dim=-1)[own] == wanted).cpu()
    if not bool(values.isfinite().all()):
        raise UserError(
            "the model's logits are not finite: its weights are damaged; take an earlier checkpoint"
        )
    return values, best
