"""Options of a generation: how a token is chosen, and when an answer ends. No torch."""

from dataclasses import dataclass

from k2train.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. A temperature of 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    Raises UserError for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(
                f"--temperature ({self.temperature}) must be from 0, the most likely token, to 100"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p ({self.top_p}) must be above 0 and at most 1, which is off")
        if self.top_k < 0:
            raise UserError(f"--top-k ({self.top_k}) must be at least 0, which is off")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UserError(
                "--top-k and --top-p choose among tokens, and temperature 0 takes the most likely "
                "one: set --temperature above 0, or leave them out"
            )


@dataclass(frozen=True)
class Limits:
    """When an answer ends, and how many prompts are continued together."""

    max_tokens: int
    stop_ids: frozenset[int]
    vocab_size: int
    """Ids that the tokenizer has: spare rows of the vocabulary are never chosen."""
    batch_prompts: int = 8
