"""Planned traffic of a rank in a step: calls and bytes of each collective, by axis and action.

- Counted from shapes, layout and program alone. A test compares it with the collectives that the
  modules call, so neither can drift.
- Bytes are those of a collective's largest tensor on the rank: all of what is gathered, reduced or
  scattered. A transfer between stages is its tensor.

    each layer        forward                       backward
    sequence whole    2 all-reduces                 2 all-reduces
    sequence split    2 gathers, 2 scatters         2 gathers, 2 scatters
    gathered again                                  2 gathers, with the weights' gradients
    recompute full                                  its forward but for the last sum
    embedding         a sum                         a gather where the sequence is split
    loss              a gather where it is split; statistics of each strip; a sum

Shoeybi et al. 2019 (arXiv:1909.08053) section 3; Korthikanti et al. 2022 (arXiv:2205.05198) section
4.2.2; Rajbhandari et al. 2020 (arXiv:1910.02054) section 5 for gradients and weights.

Alternatives considered:
- Reading them from a dry run: a plan would need torch and the modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from k2train.plan.action import Action, Op
from k2train.plan.activations import FP32, ActivationSpec
from k2train.plan.buckets import (
    buckets_of,
    matrices_of,
    norm_elements,
    norm_share,
)
from k2train.plan.cost import WEIGHT_BYTES, tensor_count
from k2train.plan.layout import Layout
from k2train.plan.memory import BUCKET_BYTES, strip_rows

GRADIENTS, WEIGHTS, REDUCE = "gradients", "weights", "reduce"
FP64 = 8
STATISTICS = 3
"""Numbers that the loss gathers for a position: maximum, sum of exponentials, label's logit."""


class Move(NamedTuple):
    """One kind of collective or transfer of a rank in a step."""

    axis: str
    kind: str
    during: str
    """Operation of the program (`FORWARD` ...), or `gradients`, `weights`, `reduce`."""
    num_bytes: int
    """Of each call."""


def rank_traffic(
    spec: ActivationSpec,
    layout: Layout,
    program: Sequence[Action],
    pp: int,
    bucket_bytes: int | None = None,
    tensor_rank: int = 0,
    flags: int = 0,
) -> Counter[Move]:
    """Calls of each move of a rank in one step on accelerators.

    `flags` are the numbers that share the exchange of the square sums.
    """
    found: Counter[Move] = Counter()
    for action in program:
        if action.op.is_compute:
            found.update(_of_action(spec, layout, action))
        else:
            kind = "send" if action.op.is_send else "receive"
            found[Move("pp", kind, action.op.name, spec.residual_bytes)] += 1

    found.update(_of_gradients(spec, layout, pp, bucket_bytes or BUCKET_BYTES, tensor_rank))
    norms = FP32 * norm_elements(spec.shape, layout, pp)
    if spec.gathers:
        # Each rank saw its part of the sequence.
        found[Move("tp", "all-reduce", REDUCE, norms)] += 1
    squares = FP64 * (tensor_count(spec.shape) + 1 + flags)
    if layout.tensor * layout.data > 1:
        found[Move("stage", "all-reduce", REDUCE, squares)] += 1
    if layout.pipeline > 1:
        found[Move("pp", "all-reduce", REDUCE, squares)] += 1
    return found


def _of_action(spec: ActivationSpec, layout: Layout, action: Action) -> Iterator[Move]:
    """Collectives over tensor-parallel ranks of one forward, backward, or part of one."""
    if layout.tensor == 1:
        return
    op, stage, size = action.op, action.stage, spec.gathered_bytes
    policies = spec.policies(len(layout.layers_of(stage, spec.shape.num_layers)))
    sums = "reduce-scatter" if spec.sequence else "all-reduce"
    gathers = again = scatters = 0

    if op is Op.FORWARD:
        gathers = scatters = 2 * len(policies)
    elif op.is_backward:
        gathers = scatters = 2 * len(policies)
        again = 2 * len(policies) if op is Op.BACKWARD else 0
        full = policies.count("full")
        gathers, scatters = gathers + 2 * full, scatters + full
    elif op is Op.BACKWARD_WEIGHT:
        again = 2 * len(policies)
    if not spec.regather:
        again = 0

    # The embedding's sum in the forward, its gather in the backward.
    scatters += stage == 0 and op is Op.FORWARD
    gathers += stage == 0 and op.is_backward
    if stage == layout.num_stages - 1 and op is Op.FORWARD:
        gathers, scatters = gathers + 1, scatters + 1
        yield from _statistics(spec, layout)

    if spec.sequence:
        yield from [Move("tp", "all-gather", op.name, size)] * (gathers + again)
    yield from [Move("tp", sums, op.name, size)] * scatters


def _statistics(spec: ActivationSpec, layout: Layout) -> Iterator[Move]:
    """What the strips of the loss gather."""
    width = -(-spec.shape.vocab_size // layout.tensor)
    rows = strip_rows(spec.tokens, width, spec.device)
    for begin in range(0, spec.tokens, rows):
        count = min(rows, spec.tokens - begin)
        size = STATISTICS * FP32 * count * layout.tensor
        yield Move("tp", "all-gather", Op.FORWARD.name, size)


def _of_gradients(
    spec: ActivationSpec, layout: Layout, pp: int, limit: int, tensor_rank: int
) -> Iterator[Move]:
    """Buckets of gradients that are summed, and of weights that come back."""
    data = layout.data
    if data == 1:
        return
    matrices = matrices_of(spec.shape, layout, pp, tensor_rank)
    shares = [one.elements for one in buckets_of(matrices, data, limit)]
    for share in [*shares, norm_share(spec.shape, layout, pp)]:
        yield Move("dp", "reduce-scatter", GRADIENTS, FP32 * data * share)
        yield Move("dp", "all-gather", WEIGHTS, WEIGHT_BYTES[spec.precision] * data * share)
