"""Rules on the number of processes, with the nearest batches and worlds that pass."""

from k2train.config.exact_rules import exact_world_mistake
from k2train.config.nearest import Values, hint, nearest
from k2train.config.profile_rules import profile_world_mistake


def world_mistakes(values: Values, world_size: int) -> list[str]:
    """Return why layout and batch do not fit `world_size` processes, one line each."""
    tensor, pipeline = values["parallel.tensor"], values["parallel.pipeline"]
    model_ranks = tensor * pipeline
    if world_size < 1 or world_size % model_ranks:
        worlds = nearest(world_size, lambda other: other % model_ranks == 0, minimum=model_ranks)
        return [
            f"world size ({world_size}) must be divisible by parallel.tensor ({tensor})"
            f" * parallel.pipeline ({pipeline}) = {model_ranks}" + hint("world size", worlds)
        ]

    data = world_size // model_ranks
    total, micro = values["batch.global_sequences"], values["batch.micro_sequences"]
    interleaved = values["parallel.schedule"] == "interleaved"

    # An interleaved schedule processes micro-batches in groups of one per pipeline rank.
    group = pipeline if interleaved else 1

    # Either the batch does not divide, or its micro-batches do not fit the schedule.
    if total % (data * micro):
        problem = (
            f"batch.global_sequences ({total}) must be divisible by data-parallel size ({data})"
            f" * batch.micro_sequences ({micro}) = {data * micro}"
        )
    elif total // (data * micro) % group:
        problem = (
            f"batch.global_sequences ({total}) / "
            f"(data-parallel size ({data}) * batch.micro_sequences ({micro})) = "
            f"{total // (data * micro)} micro-batches must be divisible by "
            f"parallel.pipeline ({pipeline}) with parallel.schedule interleaved"
        )
    else:
        found = (exact_world_mistake(values, data), profile_world_mistake(values, world_size))
        return [mistake for mistake in found if mistake is not None]

    totals = nearest(total, lambda other: other % (data * micro * group) == 0)
    micros = nearest(micro, lambda other: total % (data * other * group) == 0)
    return [
        problem
        + hint("batch.global_sequences", totals)
        + hint("batch.micro_sequences", micros)
        + f" (data-parallel size = world size {world_size} / {model_ranks})"
    ]
