"""Architecture of the model: sizes and constants that are the same for every layout. No torch."""

from dataclasses import dataclass
from math import sqrt

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


@dataclass(frozen=True)
class Architecture(ModelShape):
    """Sizes and constants of the model, the same for every layout."""

    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    rope_scaling: RopeScaling | None = None

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
