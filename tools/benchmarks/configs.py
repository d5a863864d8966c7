"""Config trees of the benches, made in code: a constant learning rate, data never opened."""

from collections.abc import Mapping
from typing import Any


def config_tree(
    model: Mapping[str, Any],
    length_tokens: int,
    sequences: int,
    micro_sequences: int,
    lr: float,
    **sections: Any,
) -> dict[str, Any]:
    """Config of a model that trains on batches of `sequences`, with more keys in `sections`."""
    return with_sections(
        {
            "run": {"name": "bench", "seed": 7},
            "model": dict(model),
            "data": {"manifest": "unused/manifest.json", "sequence_length": length_tokens},
            "batch": {"global_sequences": sequences, "micro_sequences": micro_sequences},
            "lr": {"kind": "constant", "peak": lr},
        },
        sections,
    )


def with_sections(tree: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the keys of each section set in it."""
    changed = {
        name: {**tree.get(name, {}), **values} if isinstance(values, Mapping) else values
        for name, values in sections.items()
    }
    return {**tree, **changed}
