"""Benchmark work: sizes of model and batch, and optimizer settings, equal for every contender.

- One frozen record, passed as JSON to every process, so no contender does less by a default.
- The gradient norm is not clipped. Most peers cannot clip over sharded gradients, and k2train
  computes its norm anyway: the peers save the work, not k2train.
- No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from k2train.errors import ConfigError
from k2train.plan.balance import balanced_layers
from k2train.plan.cost import ModelShape
from k2train.plan.layout import Layout


@dataclass(frozen=True)
class Work:
    """Model, batch and optimizer of a step.

    Every global batch is the same, so the loss must fall.
    """

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
        """Size of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def tokens(self) -> int:
        """Tokens per step over all ranks."""
        return self.global_sequences * self.sequence_length

    @property
    def parameters(self) -> int:
        """Number of parameters of the model.

        Untied embeddings, no biases, two norms per layer and one before the head.
        """
        layer = (
            4 * self.hidden_size**2
            + 3 * self.hidden_size * self.ffn_hidden_size
            + 2 * self.hidden_size
        )
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size


def layers_of_stages(work: Work, layout: Layout, balanced: bool) -> list[range]:
    """Layers of each pipeline stage: as many on every one, or balanced with the head.

    Balanced is the cut that k2train gives itself.
    """
    count = layout.num_stages
    counts: Sequence[int] | None = [
        (stage + 1) * work.num_layers // count - stage * work.num_layers // count
        for stage in range(count)
    ]

    if balanced:
        heads = work.num_heads
        sizes = work.num_layers, work.hidden_size, work.ffn_hidden_size
        shape = ModelShape(*sizes, heads, heads, work.vocab_size)
        counts = balanced_layers(shape, layout, work.sequence_length)
    assert counts is not None, "there are fewer layers than stages"

    return [range(start, end) for start, end in pairwise([0, *accumulate(counts)])]


def parse_work(changes: Sequence[str]) -> Work:
    """Apply `name=value` changes to the standard work.

    Raises ConfigError for a wrong name or number.
    """
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
            f"--size hidden_size ({work.hidden_size}) must be divisible by num_heads "
            f"({work.num_heads})"
        )

    if work.global_sequences % work.micro_sequences:
        raise ConfigError(
            f"--size global_sequences ({work.global_sequences}) must be divisible by "
            f"micro_sequences ({work.micro_sequences})"
        )

    return work
