"""Configs of the engines that a calibration steps, for their worker and for its reader.

- Two depths of one size differ by layers alone, two vocabularies by parameters alone.
- A small and a large layer separate what a layer costs whatever its size from what its kernels
  take in it, which is less than one by one: their input was just written.
- The same layers split over tensor-parallel ranks show what a collective waits in a step.
"""

from collections.abc import Mapping
from typing import NamedTuple

from k2train.config.load import Config


class LayerSize(NamedTuple):
    """A layer and the micro-batch that goes through it."""

    hidden: int
    ffn: int
    heads: int
    length: int
    micro: int


SMALL = LayerSize(64, 176, 2, 64, 1)
LARGE: Mapping[str, LayerSize] = {
    "cpu": LayerSize(192, 512, 6, 128, 4),
    "cuda": LayerSize(2048, 5632, 16, 2048, 1),
}
ENGINES: Mapping[str, tuple[int, int, bool]] = {
    "shallow": (1, 512, False),
    "deep": (5, 512, False),
    "wide": (1, 16384, False),
    "large": (1, 512, True),
    "large deep": (3, 512, True),
}
"""(layers, vocabulary, whether its layers are large) of each engine."""
LAYERED = ("shallow", "deep", "large", "large deep")
"""Engines whose differences are layers, which are also split over tensor-parallel ranks."""
MICROBATCHES = 2


def engine_config(
    name: str,
    kind: str,
    precision: str,
    layers: int | None = None,
    tensor: int = 1,
    sequence: bool = False,
) -> Config:
    """Config of one engine, its large layers those of a device `kind`; its data is never opened.

    `tensor` ranks share each layer, which is split along the `sequence` between its products.
    """
    own, vocab, large = ENGINES[name]
    size = LARGE[kind] if large else SMALL
    return Config.model_validate(
        {
            "run": {"name": "calibrate", "seed": 7},
            "model": {
                "num_layers": layers or own,
                "hidden_size": size.hidden,
                "ffn_hidden_size": size.ffn,
                "num_heads": size.heads,
                "num_kv_heads": size.heads,
                "vocab_size": vocab,
            },
            "data": {"manifest": "unused/manifest.json", "sequence_length": size.length},
            "batch": {
                "global_sequences": MICROBATCHES * size.micro,
                "micro_sequences": size.micro,
            },
            "parallel": {"tensor": tensor, "sequence": sequence},
            "lr": {"kind": "constant", "peak": 1e-3},
            "precision": precision,
        }
    )
