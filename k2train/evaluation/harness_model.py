"""Adapter of a checkpoint's model to lm-eval: likelihoods and answers as its `hf` backend has them.

- The harness renders and scores; tokens, passes and draws are ours. No export is needed.
- A text is encoded as in training, with nothing in front. A context without tokens is the token
  that begins a text, where the tokenizer has one, else the token that ends a document.
- To the harness there is one process: work is divided over replicas below it.

Alternatives considered:
- An export, and the `hf` backend: it needs disk for each checkpoint, and knows no grid.
"""

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from k2train.data.tokenizer import Tokenizer
from k2train.evaluation.continuation import Ending, continue_texts
from k2train.evaluation.likelihood import log_likelihoods
from k2train.inference.model import LanguageModel
from k2train.inference.options import Sampling

MAX_ANSWER_TOKENS = 256
"""Longest answer of a task that says nothing of it."""


class HarnessModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model as the harness asks it; every method is collective."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, batch: int, seed: int):
        super().__init__()
        self.model, self.texts, self.batch, self.seed = model, tokenizer, batch, seed

    @property
    def eot_token_id(self) -> int:
        """Token that ends a document."""
        return self.texts.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Token in front of what has no context."""
        begin = self.texts.bos_id
        return self.texts.eos_id if begin is None else begin

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.model.context_tokens

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode a text as in training; there are no tokens to add."""
        return self.texts.encode(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Score continuations; without a progress bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return log_likelihoods(self.model, pairs, self.batch)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood of whole texts: windows that do not overlap, each with all it may see."""
        pairs: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [make_disjoint_window(window) for window in windows]
            pairs += own
            counts.append(len(own))
        scores = iter(log_likelihoods(self.model, pairs, self.batch))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answers to prompts; those with the same options are continued together."""
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers: dict[int, str] = {}
        for numbers in kinds.values():
            prompts = [(number, requests[number].args[0]) for number in numbers]
            options = normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_ANSWER_TOKENS)
            found = self._continued(prompts, dict(options))
            answers |= dict(zip(numbers, found, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _continued(self, prompts: Sequence[tuple[int, str]], options: dict[str, Any]) -> list[str]:
        end = self.texts.decode([self.texts.eos_id])
        stops = [stop for stop in handle_stop_sequences(options["until"], eos=end) if stop]
        temperature = float(options.get("temperature", 0.0))
        sampling = (
            Sampling(
                temperature,
                int(options.get("top_k", 0)),
                float(options.get("top_p", 1.0)),
                self.seed,
            )
            if options.get("do_sample") and temperature > 0
            else Sampling()
        )
        ending = Ending(options["max_gen_toks"], tuple(stops))
        return continue_texts(self.model, self.texts, prompts, ending, sampling, self.batch)
