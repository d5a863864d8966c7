"""The work that every contender does: sizes of model and batch, and the optimizer's numbers. Standard library only.

One frozen record, handed as JSON to every process, so that no contender can do less than another by a default of its own.
The gradient norm is not clipped: most peers have no clipping over sharded gradients, and k2train computes its norm anyway,
so what is left out is left out of the peers' work and not of ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from k2train.errors import ConfigError


@dataclass(frozen=True)
class Work:
    """Model, batch and optimizer of a step; every global batch is the same one, so that the loss must fall."""

    num_layers: int = 8
    hidden_size: int = 256
    ffn_hidden_size: int = 688
    num_heads: int = 8
    vocab_size: int = 8192
    sequence_length: int = 256
    micro_sequences: int = 4
    global_sequences: int = 16
    seed: int = 1234
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def tokens(self) -> int:
        """Tokens of a step, all ranks together."""
        return self.global_sequences * self.sequence_length

    @property
    def parameters(self) -> int:
        """Parameters of the model: untied embeddings, no biases, two norms a layer and one before the head."""
        layer = (
            4 * self.hidden_size**2
            + 3 * self.hidden_size * self.ffn_hidden_size
            + 2 * self.hidden_size
        )
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size


def parse_work(changes: Sequence[str]) -> Work:
    """The standard work with `name=value` changes; raises ConfigError for a name or a number that is none."""
    fields = {field.name: field.type for field in dataclasses.fields(Work)}
    values: dict[str, int | float] = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in fields:
            raise ConfigError(f"--size {change}: {name} is not one of {', '.join(fields)}")
        try:
            values[name] = int(text) if fields[name] == "int" else float(text)
        except ValueError:
            raise ConfigError(f"--size {change}: {text!r} is no {fields[name]}") from None
        if values[name] <= 0:
            raise ConfigError(f"--size {change}: must be above 0")
    work = dataclasses.replace(Work(), **values)  # type: ignore[arg-type]
    if work.hidden_size % work.num_heads:
        raise ConfigError(
            f"--size hidden_size ({work.hidden_size}) must be divisible by num_heads ({work.num_heads})"
        )
    if work.global_sequences % work.micro_sequences:
        raise ConfigError(
            f"--size global_sequences ({work.global_sequences}) must be divisible by micro_sequences ({work.micro_sequences})"
        )
    return work
