"""Gradients that leave beside held activations: one count for one and for several stages."""

import pytest

from k2train.plan.action import Op
from k2train.plan.activations import FP32, ActivationSpec, layer_bytes, stage_bytes
from k2train.plan.buckets import buckets_of, matrices_of
from k2train.plan.cost import ModelShape
from k2train.plan.layout import Layout
from k2train.plan.leaving import BACKWARDS, leaving_bytes
from k2train.plan.schedule import build_programs

SHAPE = ModelShape(8, 256, 704, 8, 4, 1000)
WORK = ActivationSpec(SHAPE, 256, 1, "bf16")
LAYOUT = Layout(pipeline=2, data=4, stages_per_rank=2)
PROGRAM = build_programs("interleaved", 2, 4, 2)[0]
WHOLE = 2**50
NOTHING = ((0.5, 0),)


def gradients(layout: Layout) -> int:
    """Bytes of all transfers of the first rank, and of its share of their sums."""
    (bucket,) = buckets_of(matrices_of(SHAPE, layout, 0), layout.data, WHOLE)
    return FP32 * (layout.data + 1) * bucket.elements


def test_a_bucket_of_several_stages_leaves_with_the_last() -> None:
    """Catches gradients that leave before they are there: one bucket, sent when nothing is held."""
    alone = ActivationSpec(SHAPE, 1, 1, "bf16")
    sent = gradients(LAYOUT) + alone.gathered_bytes + 2 * alone.residual_bytes
    assert leaving_bytes(alone, LAYOUT, PROGRAM, 0, WHOLE, NOTHING, 0) == sent


def test_a_stage_that_ended_has_left_while_another_holds_its_micro_batches() -> None:
    """Catches a later stage's gradients counted as gone while the first stage's layers wait."""
    # The later stage's last backward comes first; its layers leave one by one from then on.
    ends = {action.stage: index for index, action in enumerate(PROGRAM) if action.op in BACKWARDS}
    assert ends[2] < ends[0]
    held = sum(
        {Op.FORWARD: 1, Op.BACKWARD: -1}.get(action.op, 0) * stage_bytes(WORK, LAYOUT, action.stage)
        for action in PROGRAM[: ends[2] + 1]
    )
    assert held > 0
    one_by_one = buckets_of(matrices_of(SHAPE, LAYOUT, 0), LAYOUT.data, 1)
    later = [bucket for bucket in one_by_one if bucket.position >= 2]
    sent = FP32 * (LAYOUT.data + 1) * sum(bucket.elements for bucket in later)
    assert leaving_bytes(WORK, LAYOUT, PROGRAM, 0, 1, NOTHING, 0) >= sent + held


@pytest.mark.parametrize("swiglu", (0, 10**7))
def test_layers_below_are_held_while_those_above_have_left(swiglu: int) -> None:
    """Catches a moment left out, and a gate and up gradient that left before it was there.

    By hand, for one stage of eight layers: the SwiGLU's backward has its layer's last product
    gone, and gate and up still to come.
    """
    layout = Layout(data=4)
    buckets = buckets_of(matrices_of(SHAPE, layout, 0), layout.data, 1)
    each = FP32 * (layout.data + 1)
    moments = []
    for layer in range(8):
        below = layer * layer_bytes(WORK, "none")
        for position, size in ((0.75, swiglu), (0.5, 1000)):
            gone = sum(one.elements for one in buckets if one.position >= layer + position)
            moments.append(each * gone + below + size)
    end = each * sum(one.elements for one in buckets) + WORK.gathered_bytes
    working = ((0.75, swiglu), (0.5, 1000))
    assert leaving_bytes(WORK, layout, (), 0, 1, working, 0) == max(*moments, end)
