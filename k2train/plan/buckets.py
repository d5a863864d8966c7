"""Buckets of a rank's gradients, from shapes alone: how its matrices are cut into transfers.

- The sizes and cuts are those of `parallel.shard_layout`: rows in blocks for data-parallel ranks,
  parameters at multiples of 64 elements, cuts from the end of the shard.
- Norms are one more bucket, the last to leave.

Alternatives considered:
- The parameters' bytes divided by a bucket's: the cuts follow parameters, and the padding counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from k2train.plan.cost import ModelShape
from k2train.plan.layout import Layout

FP32 = 4
ALIGNED = 64
"""Elements to whose multiples parameters are padded."""
EMBEDDING, GATE_UP, DOWN = -1.0, 0.5, 0.75
"""Positions of parameters in a rank's backward: layer i's from i, query to down projection."""


@dataclass(frozen=True)
class Matrix:
    """A parameter with weight decay on one rank."""

    rows: tuple[int, ...]
    """Of each named tensor in it."""
    width: int
    position: float
    """A backward pass meets positions from the highest to the lowest."""

    def share(self, data: int) -> int:
        """Elements of one of `data` ranks."""
        return aligned(sum(math.ceil(n / data) for n in self.rows) * self.width)


@dataclass(frozen=True)
class PlannedBucket:
    """One transfer."""

    elements: int
    """Of each data-parallel rank."""
    position: float
    """The lowest of its parameters: it leaves when that has its gradient."""


def aligned(elements: int) -> int:
    """Round up to the alignment of parameters."""
    return math.ceil(elements / ALIGNED) * ALIGNED


def matrices_of(
    shape: ModelShape, layout: Layout, pp: int, tensor_rank: int = 0
) -> tuple[Matrix, ...]:
    """Matrices of a rank, in the order of its shard."""
    h, f, tensor = shape.hidden_size, shape.ffn_hidden_size // layout.tensor, layout.tensor
    heads = h // tensor
    kv = shape.num_kv_heads * shape.head_dim // tensor
    block = math.ceil(shape.vocab_size / tensor)
    start = min(tensor_rank * block, shape.vocab_size)
    table = min(start + block, shape.vocab_size) - start

    found, layer, stages = [], 0, layout.stages_of(pp)
    for stage in stages:
        if stage == 0:
            found.append(Matrix((table,), h, EMBEDDING))
        for _ in layout.layers_of(stage, shape.num_layers):
            found += [
                Matrix((heads, kv, kv), h, float(layer)),
                Matrix((h,), heads, layer + 0.25),
                Matrix((f, f), h, layer + GATE_UP),
                Matrix((h,), f, layer + DOWN),
            ]
            layer += 1
        if stage == layout.num_stages - 1:
            found.append(Matrix((table,), h, float(layer)))
    return tuple(found)


def buckets_of(
    matrices: Sequence[Matrix], data: int, limit_bytes: int
) -> tuple[PlannedBucket, ...]:
    """Cut matrices into transfers of about `limit_bytes`, in the order in which they leave."""
    found, held = [], 0
    for matrix in reversed(matrices):
        held += matrix.share(data)
        if held >= limit_bytes // (FP32 * data) or matrix is matrices[0]:
            found.append(PlannedBucket(held, matrix.position))
            held = 0
    return tuple(found)


def norm_elements(shape: ModelShape, layout: Layout, pp: int) -> int:
    """Elements of a rank's norms, which every tensor-parallel rank has whole."""
    stages = layout.stages_of(pp)
    layers = sum(len(layout.layers_of(stage, shape.num_layers)) for stage in stages)
    return (2 * layers + (layout.num_stages - 1 in stages)) * shape.hidden_size


def norm_share(shape: ModelShape, layout: Layout, pp: int) -> int:
    """Elements of the norms' bucket of each data-parallel rank."""
    count = norm_elements(shape, layout, pp) // shape.hidden_size
    return count * aligned(math.ceil(shape.hidden_size / layout.data))
