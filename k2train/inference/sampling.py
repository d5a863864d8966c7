"""Next-token choice: greedy, or drawn at a temperature from the top-k and top-p of the logits.

- The order is temperature, top-k, top-p, as in transformers.
- Each draw has a random number of its own, keyed by seed, prompt and position. So it depends
  neither on the other prompts of a batch nor on the layout.
- A draw inverts the cumulative probabilities, in fp64, in the order of the vocabulary.

Alternatives considered:
- torch's generator: its stream depends on the device and on earlier draws.
- The Gumbel trick: needs a random number for each entry of the vocabulary.
"""

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor

from k2train.errors import UserError
from k2train.inference.options import Sampling


def uniform(seed: int, prompt: int, position: int) -> float:
    """Random number in [0, 1) of one draw: 53 bits of a hash of its key."""
    key = f"k2train/sampling/{seed}/{prompt}/{position}".encode()
    return (int.from_bytes(sha256(key).digest()[:8], "little") >> 11) / 2**53


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [b, v] of the next token, fp64, from logits [b, v]; 0 where it is left out."""
    scaled = logits.double() / sampling.temperature

    if 0 < sampling.top_k < scaled.shape[-1]:
        # Tokens that tie with the last one stay.
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))

    if sampling.top_p < 1:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        ranked = ordered.softmax(dim=-1)
        # Left out once the more likely ones hold `top_p`; the first one always stays.
        out = ranked.cumsum(dim=-1) - ranked >= sampling.top_p
        out[:, 0] = False
        scaled = scaled.masked_fill(out.scatter(-1, order, out), float("-inf"))

    return scaled.softmax(dim=-1)


def choose(logits: Tensor, sampling: Sampling, draws: Sequence[tuple[int, int]]) -> Tensor:
    """Next tokens [b], on the host, from logits [b, v].

    `draws` has the prompt and the position of each. Raises UserError for logits that are NaN.
    """
    if bool(logits.isnan().any()):
        raise UserError(
            "the model's logits are NaN: its weights are not finite; take an earlier checkpoint"
        )
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).cpu()

    below = probabilities(logits, sampling).cpu().cumsum(dim=-1)
    numbers = [uniform(sampling.seed, prompt, position) for prompt, position in draws]
    # Times the sum, which rounding may leave beside 1.
    wanted = torch.tensor(numbers, dtype=torch.float64)[:, None] * below[:, -1:]
    return torch.searchsorted(below, wanted, right=True).squeeze(-1)
