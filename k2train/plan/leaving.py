"""Gradients that leave while a step's last backward passes run, and what is held beside them.

- With overlap a bucket leaves as soon as its last parameter has its gradient, and none is back
  before the step's end. Activations shrink while transfers grow, so each moment is counted.
- One count for any number of stages on a rank: a bucket may hold parameters of several, and leaves
  with the last of them, while other stages still hold micro-batches.

Alternatives considered:
- All gradients beside all activations: they are never there together.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from k2train.plan.action import Action, Op
from k2train.plan.activations import (
    FP32,
    ActivationSpec,
    layer_bytes,
    stage_bytes,
    stage_deferred_bytes,
)
from k2train.plan.buckets import EMBEDDING, buckets_of, matrices_of
from k2train.plan.layout import Layout

BACKWARDS = (Op.BACKWARD, Op.BACKWARD_WEIGHT)
"""Actions that make weight gradients."""
COMPUTED = (*BACKWARDS, Op.BACKWARD_INPUT)
"""Actions with a layer's backward in them."""


def leaving_bytes(
    spec: ActivationSpec,
    layout: Layout,
    program: Sequence[Action],
    pp: int,
    limit: int,
    working: Sequence[tuple[float, int]],
    norm: int,
) -> int:
    """Most bytes of gradients that left, held activations and what is computed meanwhile.

    A bucket leaves with the last of its parameters, in the last backward of their stage. Other
    stages of the rank may then still hold micro-batches. An empty program is one backward of each
    stage.

    `limit`: bytes of a bucket. `working`: moments of a layer's backward, each with the position in
    it that has its gradients and the working set. `norm`: a norm's working set.
    """
    held, done, most = 0, set[int](), 0
    buckets = list(_stages_of_buckets(spec, layout, pp, limit))
    program = program or [Action(Op.BACKWARD, stage, 0) for stage in layout.stages_of(pp)[::-1]]
    last = {action.stage: index for index, action in enumerate(program) if action.op in BACKWARDS}
    # A search of layouts walks a million actions: what a stage has is counted once.
    sizes = {
        stage: (stage_bytes(spec, layout, stage), stage_deferred_bytes(spec, layout, stage))
        for stage in {action.stage for action in program}
    }
    fullest = max(size for _, size in working)
    sent = 0

    for index, action in enumerate(program):
        stage = action.stage
        kept, waiting = sizes[stage]
        if last.get(stage) == index:
            others = held - (waiting if action.op is Op.BACKWARD_WEIGHT else kept)
            moments = _last_backward(spec, layout, pp, stage, working, norm)
            sent_at = _sent_at(layout, buckets, done, stage)
            most = max(
                most,
                *(max(0, others) + size + sent_at(position) for position, size in moments),
            )
            done.add(stage)
            sent = sent_at(-math.inf)
        elif layout.stages_per_rank > 1 and action.op in COMPUTED:
            most = max(most, sent + held + fullest)
        held += {
            Op.FORWARD: kept,
            Op.BACKWARD: -kept,
            Op.BACKWARD_INPUT: waiting - kept,
            Op.BACKWARD_WEIGHT: -waiting,
        }.get(action.op, 0)
    return most


def _sent_at(
    layout: Layout, buckets: Sequence[tuple[int, dict[int, float]]], done: set[int], stage: int
) -> Callable[[float], int]:
    """Bytes of transfers that began once `stage` has its gradients from a position up.

    All ranks' rows, and this rank's share of their sums. `done`: stages with all their gradients.
    """
    last = {*done, stage}
    began = [(elements, lowest) for elements, lowest in buckets if lowest.keys() <= last]
    before = sum(elements for elements, lowest in began if stage not in lowest)
    # They leave from the highest position down.
    own = sorted((-lowest[stage], elements) for elements, lowest in began if stage in lowest)
    positions = [position for position, _ in own]
    sums = list(accumulate((elements for _, elements in own), initial=before))
    return lambda position: FP32 * (layout.data + 1) * sums[bisect_right(positions, -position)]


def _stages_of_buckets(
    spec: ActivationSpec, layout: Layout, pp: int, limit: int
) -> Iterator[tuple[int, dict[int, float]]]:
    """Elements of each bucket and data-parallel rank, and its lowest position in each stage."""
    begins, layer = dict[int, float](), 0
    for stage in layout.stages_of(pp):
        begins[stage] = EMBEDDING if stage == 0 else layer
        layer += len(layout.layers_of(stage, spec.shape.num_layers))
    ends = dict(zip(begins, [*list(begins.values())[1:], math.inf], strict=True))

    above = math.inf
    for bucket in buckets_of(matrices_of(spec.shape, layout, pp), layout.data, limit):
        yield (
            bucket.elements,
            {
                stage: max(begin, bucket.position)
                for stage, begin in begins.items()
                if begin < above and bucket.position < ends[stage]
            },
        )
        above = bucket.position


def _last_backward(
    spec: ActivationSpec,
    layout: Layout,
    pp: int,
    stage: int,
    working: Sequence[tuple[float, int]],
    norm: int,
) -> Iterator[tuple[float, int]]:
    """Moments of a stage's last backward: (position that has its gradients, bytes held)."""
    counts = {
        one: len(layout.layers_of(one, spec.shape.num_layers)) for one in layout.stages_of(pp)
    }
    policies = spec.policies(counts[stage])
    first = sum(count for one, count in counts.items() if one < stage)
    # A stage's output that was sent, and the gradient that was received, last until its end.
    crossing = 2 * spec.residual_bytes if layout.num_stages > 1 else 0

    # Layers below still hold what their forward kept.
    held = accumulate((layer_bytes(spec, policy) for policy in policies), initial=0)
    for index, below in zip(range(len(policies)), held, strict=False):
        for position, size in working:
            yield first + index + position, below + size + crossing
        yield first + index, below + norm + crossing
    # Norms go last, when all layers are done.
    yield EMBEDDING, (spec.gathered_bytes if stage == 0 else norm) + crossing
