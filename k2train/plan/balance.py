"""How many layers each pipeline stage should hold, so that the ranks with the embedding and the head are not the slow ones.

The slowest rank sets the pace of every schedule, and the head alone costs as much as several layers of a small model.
Counted in FLOPs, which is what a plan has; the alternative refused is a measurement, which needs the machine. The split
found is a hint for `parallel.layers_per_stage` and never taken by itself: it would change what a checkpoint's stages mean
to read, for a gain that only the machine can confirm.
"""

from __future__ import annotations

from dataclasses import replace

from k2train.plan.cost import ModelShape, layer_matrix_parameters
from k2train.plan.layout import Layout


def layer_flops(shape: ModelShape, sequence_length: int) -> int:
    """Forward and backward of one layer, for one token."""
    return 6 * layer_matrix_parameters(shape) + 12 * sequence_length * shape.hidden_size


def head_flops(shape: ModelShape) -> int:
    """Forward and backward of the product of the head, for one token; the embedding is a look-up and counts as nothing."""
    return 6 * shape.vocab_size * shape.hidden_size


def stage_flops(shape: ModelShape, layout: Layout, stage: int, sequence_length: int) -> int:
    """Forward and backward of one stage for one token, all tensor-parallel ranks together; the stages sum to the model's."""
    layers = len(layout.layers_of(stage, shape.num_layers)) * layer_flops(shape, sequence_length)
    return layers + (head_flops(shape) if stage == layout.num_stages - 1 else 0)


def rank_flops(shape: ModelShape, layout: Layout, sequence_length: int) -> tuple[int, ...]:
    """The FLOPs a token of each pipeline rank: the sum of its stages."""
    return tuple(
        sum(stage_flops(shape, layout, stage, sequence_length) for stage in layout.stages_of(pp))
        for pp in range(layout.pipeline)
    )


def balanced_layers(
    shape: ModelShape, layout: Layout, sequence_length: int
) -> tuple[int, ...] | None:
    """The layers of each stage that make the slowest rank fastest, and then the slowest stage; None with too few layers.

    Layers are dealt one at a time to the rank with the least to do, and on it to its stage with the least: since all
    layers cost the same, no other deal has a faster slowest rank.
    """
    if shape.num_layers < layout.num_stages:
        return None
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


def with_layers(layout: Layout, layers_per_stage: tuple[int, ...]) -> Layout:
    """The same grid with its layers dealt out anew."""
    return replace(layout, layers_per_stage=layers_per_stage)
