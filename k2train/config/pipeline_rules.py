"""Rules on the pipeline: layers on stages, and what each schedule needs.

- `k2train.config.rules` registers them with all the others.
- `auto` is chosen later (`k2train.plan.pipeline_choice`): here it must only have a choice.
"""

from collections.abc import Callable

from k2train.config.nearest import (
    Values,
    fits_layers,
    hint,
    least_stages_per_rank,
    nearest,
    nearest_pipeline,
    nearest_stages_per_rank,
)

Check = Callable[[Values], str | None]
_STAGES = ("parallel.pipeline", "parallel.stages_per_rank")


def _stages(values: Values) -> str | None:
    by_hand = values["parallel.layers_per_stage"]
    if by_hand not in (None, "auto"):
        return None
    layers, pipeline = values["model.num_layers"], values["parallel.pipeline"]
    stages_per_rank = least_stages_per_rank(values)
    stages = pipeline * stages_per_rank
    if fits_layers(layers, stages, by_hand):
        return None
    if by_hand == "auto":
        return (
            f"model.num_layers ({layers}) must be at least parallel.pipeline ({pipeline})"
            f" * parallel.stages_per_rank ({stages_per_rank}) = {stages}"
            + nearest_pipeline(values)
            + f"; nearest model.num_layers: {stages}"
        )
    return (
        f"model.num_layers ({layers}) must be divisible by parallel.pipeline ({pipeline})"
        f" * parallel.stages_per_rank ({stages_per_rank}) = {stages}"
        + nearest_pipeline(values)
        + (
            nearest_stages_per_rank(values)
            if stages_per_rank > 1 and values.get("parallel.schedule") != "zb-v"
            else ""
        )
        + hint("model.num_layers", nearest(layers, lambda other: other % stages == 0))
        + ("; or parallel.layers_per_stage: auto" if layers >= stages else "")
    )


def _uneven_stages(values: Values) -> str | None:
    by_hand, pipeline = values["parallel.layers_per_stage"], values["parallel.pipeline"]
    stages_per_rank, layers = values["parallel.stages_per_rank"], values.get("model.num_layers")
    if by_hand == "auto":
        return None
    setting = f"parallel.layers_per_stage ({', '.join(map(str, by_hand or ()))})"
    if by_hand is not None and len(by_hand) != pipeline * stages_per_rank:
        return (
            f"{setting} must have parallel.pipeline ({pipeline}) * "
            f"parallel.stages_per_rank ({stages_per_rank}) = {pipeline * stages_per_rank} counts, "
            f"has {len(by_hand)}"
            + nearest_pipeline(values)
            + "; or null: as many layers on every stage"
        )
    if by_hand is not None and layers is not None and sum(by_hand) != layers:
        return (
            f"{setting} must add up to model.num_layers ({layers}), is {sum(by_hand)}; "
            f"nearest model.num_layers: {sum(by_hand)}"
        )
    return None


def _schedule(values: Values) -> str | None:
    schedule, pipeline = values["parallel.schedule"], values["parallel.pipeline"]
    stages_per_rank = values["parallel.stages_per_rank"]
    if schedule == "auto":
        return None
    if schedule != "interleaved":
        wanted = 2 if schedule == "zb-v" else 1
        if stages_per_rank == wanted:
            return None
        other = {1: "1f1b", 2: "interleaved or zb-v"}.get(stages_per_rank, "interleaved")
        return (
            f"parallel.schedule ({schedule}) runs {wanted} stage{'s' if wanted > 1 else ''} a rank"
            f", but parallel.stages_per_rank is {stages_per_rank}; "
            f"set parallel.stages_per_rank: {wanted} or parallel.schedule: {other}"
        )

    if pipeline < 2:
        name, number, near = "parallel.pipeline", pipeline, nearest_pipeline(values)
    elif stages_per_rank < 2:
        name, number, near = (
            "parallel.stages_per_rank",
            stages_per_rank,
            nearest_stages_per_rank(values),
        )
    else:
        return None
    return (
        f"parallel.schedule (interleaved) needs a {name} of 2 or more, is {number}{near}; "
        "or parallel.schedule: 1f1b"
    )


PIPELINE_RULES: tuple[tuple[tuple[str, ...], Check], ...] = (
    (("model.num_layers", *_STAGES, "parallel.layers_per_stage"), _stages),
    (("parallel.layers_per_stage", *_STAGES), _uneven_stages),
    (("parallel.schedule", "parallel.stages_per_rank", "parallel.pipeline"), _schedule),
)
"""The keys that each rule needs, and the rule."""
