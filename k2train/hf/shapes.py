"""Sizes of a model as a manifest has them, and shapes of its tensors by our names. No torch."""

from pathlib import Path

from pydantic import ValidationError

from k2train.checkpoint.manifest import MANIFEST, CheckpointManifest
from k2train.config.schema import ModelConfig
from k2train.errors import CheckpointError
from k2train.json_record import first_mistake
from k2train.model.architecture import Architecture, ModelSection


def architecture_of(path: Path, manifest: CheckpointManifest) -> Architecture:
    """Return the model that a checkpoint holds. Raises CheckpointError when it does not say."""
    try:
        m = ModelConfig.model_validate(manifest.config.get("model"))
    except ValidationError as error:
        raise CheckpointError(f"{path / MANIFEST}: config.model: {first_mistake(error)}") from None
    return Architecture.of(ModelSection(m))


def tensor_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, in the order of the forward pass."""
    hidden, inner, kv = a.hidden_size, a.ffn_hidden_size, a.num_kv_heads * a.head_dim
    matrices = {
        "embedding": (a.vocab_size, hidden),
        "head": (a.vocab_size, hidden),
        "query": (hidden, hidden),
        "key": (kv, hidden),
        "value": (kv, hidden),
        "output": (hidden, hidden),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    # The others are norms.
    return {name: matrices.get(name.split(".")[-2], (hidden,)) for name in a.tensor_names()}
