"""Architecture of the model: sizes and constants that are the same for every layout. No torch."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, Protocol, Self

from k2train.plan.cost import ModelShape


@dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary wavelengths by the rule of Llama 3.1 (Dubey et al. 2024, arXiv:2407.21783).

    Wavelengths longer than `original_max_position_embeddings` / `low_freq_factor` become `factor`
    times as long, those shorter than that length / `high_freq_factor` stay.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class Described(Protocol):
    """What has a config's model section: a config, or the part of one in a manifest."""

    @property
    def model(self) -> Any:
        """The section, its keys as attributes."""


@dataclass(frozen=True)
class ModelSection:
    """A model section alone."""

    model: Any


@dataclass(frozen=True)
class Architecture(ModelShape):
    """Sizes and constants of the model, the same for every layout."""

    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    rope_scaling: RopeScaling | None = None

    @classmethod
    def of(cls, config: Described) -> Self:
        """Return the architecture of a config's model section, with `num_kv_heads` resolved."""
        m, scaling = config.model, config.model.rope_scaling
        assert m.num_kv_heads is not None, "the config resolves num_kv_heads"
        return cls(
            m.num_layers,
            m.hidden_size,
            m.ffn_hidden_size,
            m.num_heads,
            m.num_kv_heads,
            m.vocab_size,
            m.rope_theta,
            m.norm_eps,
            m.init_std,
            None if scaling is None else RopeScaling(**scaling.model_dump(exclude={"type"})),
        )

    @property
    def output_std(self) -> float:
        """Initial std of matrices that write into the residual stream: std / sqrt(2 * layers)."""
        return self.init_std / sqrt(2 * self.num_layers)

    def tensor_names(self) -> list[str]:
        """Return every global tensor name, in the order of the forward pass."""
        inner = [
            "attention_norm",
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.output",
        ]
        inner += ["mlp_norm", "mlp.gate", "mlp.up", "mlp.down"]
        layers = [f"layers.{n}.{part}.weight" for n in range(self.num_layers) for part in inner]
        return ["embedding.weight", *layers, "norm.weight", "head.weight"]
