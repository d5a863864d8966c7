"""Nearest legal values of a key: what a message about a broken rule suggests.

- A suggested value passes every rule about this value, so following it does not cause another
  error.
"""

from collections.abc import Callable, Mapping
from typing import Any

Values = Mapping[str, Any]
"""Dotted key -> value."""

SEARCH_LIMIT = 20_000


def nearest(value: int, legal: Callable[[int], bool], minimum: int = 1) -> list[int]:
    """Return the closest legal number below `value` and the closest above it, where they exist."""
    below = range(value - 1, max(minimum, value - SEARCH_LIMIT) - 1, -1)
    above = range(max(value + 1, minimum), value + SEARCH_LIMIT)
    return [
        found
        for numbers in (below, above)
        if (found := next(filter(legal, numbers), None)) is not None
    ]


def hint(key: str, numbers: list[int], when_none: str = "; no {key} fits") -> str:
    """Return the end of a message: the nearest values of a key, or `when_none`."""
    return (
        f"; nearest {key}: {', '.join(map(str, numbers))}" if numbers else when_none.format(key=key)
    )


def fits_tensor(values: Values, tensor: int) -> bool:
    """Return whether model and sequence divide over `tensor` ranks."""
    keys = ["model.num_heads", "model.num_kv_heads", "model.ffn_hidden_size"]
    if values.get("parallel.sequence"):
        keys.append("data.sequence_length")
    return all(values[key] % tensor == 0 for key in keys if key in values) and tensor <= values.get(
        "model.vocab_size", tensor
    )


def fits_layers(layers: int, stages: int, cut: Any) -> bool:
    """Return whether layers can be divided over stages by `parallel.layers_per_stage`."""
    if cut == "auto":
        return layers >= stages
    return layers % stages == 0 if cut is None else len(cut) == stages


def least_stages_per_rank(values: Values) -> int:
    """Return the stages of a rank; with the schedule `auto` the fewest that it may take."""
    by_hand = values["parallel.layers_per_stage"]
    free = values.get("parallel.schedule") == "auto" and by_hand in (None, "auto")
    return 1 if free else int(values["parallel.stages_per_rank"])


def fits_stages(values: Values, pipeline: int, stages_per_rank: int) -> bool:
    """Return whether the layers fit the stages and the schedule has enough stages per rank."""
    schedule, layers = values.get("parallel.schedule"), values.get("model.num_layers", 0)
    if schedule == "zb-v" and stages_per_rank != 2:
        return False
    smallest = 2 if schedule == "interleaved" else 1

    by_hand = values.get("parallel.layers_per_stage")
    fits = fits_layers(layers, pipeline * stages_per_rank, by_hand)
    return min(pipeline, stages_per_rank) >= smallest and fits


def nearest_pipeline(values: Values) -> str:
    """Return the end of a message: the nearest `parallel.pipeline`."""
    pipeline, stages_per_rank = values["parallel.pipeline"], least_stages_per_rank(values)
    if values.get("parallel.schedule") == "interleaved":
        stages_per_rank = max(stages_per_rank, 2)
    numbers = nearest(pipeline, lambda other: fits_stages(values, other, stages_per_rank))
    return hint("parallel.pipeline", numbers)


def nearest_stages_per_rank(values: Values) -> str:
    """Return the end of a message: the nearest `parallel.stages_per_rank`."""
    pipeline, stages_per_rank = values["parallel.pipeline"], values["parallel.stages_per_rank"]
    numbers = nearest(stages_per_rank, lambda other: fits_stages(values, pipeline, other))
    return hint("parallel.stages_per_rank", numbers)
