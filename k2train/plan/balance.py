"""Pipeline load balance: layers per stage that keep the rank with the head from being slowest.

- The slowest rank sets the pace of every schedule. In a small model the head alone costs as much as
  several layers.
- Counted in FLOPs, which a plan knows.
- `parallel.layers_per_stage: auto`, the default, takes the result where a simulated step gains
  (`plan.pipeline_choice`). With `null` it is a hint.

Alternatives considered:
- A measurement: needs the machine.
"""

from __future__ import annotations

from dataclasses import replace

from k2train.plan.cost import ModelShape, layer_matrix_parameters
from k2train.plan.layout import Layout


def layer_flops(shape: ModelShape, sequence_length: int) -> int:
    """FLOPs of forward and backward of one layer, for one token."""
    return 6 * layer_matrix_parameters(shape) + 12 * sequence_length * shape.hidden_size


def head_flops(shape: ModelShape) -> int:
    """FLOPs of forward and backward of the head's product, for one token.

    The embedding is a look-up and counts as 0.
    """
    return 6 * shape.vocab_size * shape.hidden_size


def stage_flops(shape: ModelShape, layout: Layout, stage: int, sequence_length: int) -> int:
    """FLOPs of forward and backward of one stage for one token, all tensor-parallel ranks together.

    The stages sum to the model's.
    """
    layers = len(layout.layers_of(stage, shape.num_layers)) * layer_flops(shape, sequence_length)
    return layers + (head_flops(shape) if stage == layout.num_stages - 1 else 0)


def rank_flops(shape: ModelShape, layout: Layout, sequence_length: int) -> tuple[int, ...]:
    """FLOPs per token of each pipeline rank: the sum of its stages."""
    return tuple(
        sum(stage_flops(shape, layout, stage, sequence_length) for stage in layout.stages_of(pp))
        for pp in range(layout.pipeline)
    )


def balanced_layers(
    shape: ModelShape, layout: Layout, sequence_length: int
) -> tuple[int, ...] | None:
    """Layers per stage that minimize the slowest rank, then the slowest stage.

    None with too few layers. Each layer goes to the rank with the least work, and there to the
    stage with the least. All layers cost the same, so no other assignment has a faster slowest
    rank.
    """
    if shape.num_layers < layout.num_stages:
        return None

    # Every stage has one layer, the last one also the head.
    layer = layer_flops(shape, sequence_length)
    counts = [1] * layout.num_stages
    cost = [layer] * layout.num_stages
    cost[-1] += head_flops(shape)

    for _ in range(shape.num_layers - layout.num_stages):
        pp = min(
            range(layout.pipeline),
            key=lambda pp: sum(cost[stage] for stage in layout.stages_of(pp)),
        )
        stage = min(layout.stages_of(pp), key=lambda stage: cost[stage])
        counts[stage] += 1
        cost[stage] += layer

    return tuple(counts)


def nearly_even_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers per stage that differ by one at most; later stages, one of them with the head, have
    fewer.
    """
    each, rest = divmod(num_layers, num_stages)
    return tuple(each + (stage < rest) for stage in range(num_stages))


def with_layers(layout: Layout, layers_per_stage: tuple[int, ...]) -> Layout:
    """Return the same grid with other layers per stage."""
    return replace(layout, layers_per_stage=layers_per_stage)
