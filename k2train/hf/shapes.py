"""Shapes of a model's tensors by our names, from its sizes alone. No torch."""

from k2train.model.architecture import Architecture


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
