"""Cut and schedule that `auto` takes: by hand, and against trying everything in the simulator."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.plan.action import Op
from k2train.plan.cost import ModelShape, flops_per_token
from k2train.plan.pipeline_choice import (
    MEMORY,
    PAYS,
    SMALLEST_LAYER,
    Asked,
    PipelineChoice,
    PipelineWork,
    choose_cut,
    choose_pipeline,
    simulated,
    stage_durations,
)
from k2train.plan.schedule import build_programs
from k2train.plan.simulate import simulate

HAND = ModelShape(
    num_layers=8, hidden_size=4, ffn_hidden_size=8, num_heads=2, num_kv_heads=2, vocab_size=92
)
"""A layer has 4 x 16 + 3 x 32 = 160 elements in matrices. On samples of 3 tokens its forward takes
320 + 48 FLOPs a token, its gradients 416 and 320. The head takes 6 x 92 x 4 = 2208: two layers."""
WORK = PipelineWork(HAND, sequence_length=3, pipeline=2, num_microbatches=4)


def slow_simulated(work: PipelineWork, choice: PipelineChoice) -> float:
    """Time of a step by the other simulator, every micro-batch of it."""
    durations = stage_durations(work, work.layout(choice))
    programs = build_programs(
        choice.schedule, work.pipeline, work.num_microbatches, choice.stages_per_rank
    )

    def seconds(action: object) -> float:
        return durations[action.stage].get(action.op, 0.0)  # type: ignore[attr-defined]

    return max(span.end_seconds for span in simulate(programs, seconds))


def test_durations_and_the_cut_by_hand() -> None:
    """Catches FLOPs of a stage that are not those of the model, and a head that is not counted."""
    first, last = stage_durations(WORK, WORK.layout(PipelineChoice("1f1b", 1, None)))
    assert (first[Op.FORWARD], first[Op.BACKWARD]) == (4 * 368, 4 * 736)
    assert (first[Op.BACKWARD_INPUT], first[Op.BACKWARD_WEIGHT]) == (4 * 416, 4 * 320)
    # The fused loss has made the head's gradients by the end of the forward.
    assert (last[Op.FORWARD], last[Op.BACKWARD]) == (4 * 368 + 2208, 4 * 736)
    total = sum(d[op] for d in (first, last) for op in (Op.FORWARD, Op.BACKWARD))
    assert total == flops_per_token(HAND, 3)

    unfused = PipelineWork(HAND, 3, 2, 4, fused_loss=False)
    _, last = stage_durations(unfused, unfused.layout(PipelineChoice("1f1b", 1, None)))
    assert (last[Op.FORWARD], last[Op.BACKWARD]) == (4 * 368 + 736, 4 * 736 + 2 * 736)

    # Even: the last rank waits for one forward, works without a pause, and one backward follows.
    even = 1472 + 4 * (3680 + 2944) + 2944
    # Cut 5 and 3: both ranks have 5520 a micro-batch; the first waits 3680 for the first backward.
    cut = 1840 + 1840 + 3680 + 3 * (3680 + 1840) + 3680
    assert simulated(WORK, PipelineChoice("1f1b", 1, None)) == even == 30912
    assert simulated(WORK, PipelineChoice("1f1b", 1, (5, 3))) == cut == 27600
    assert choose_cut(WORK, "1f1b", 1) == ((5, 3), "[5, 3]: 10.7% less time than even stages")


def test_a_cut_that_gains_little_is_not_taken() -> None:
    """Catches stages that change for a gain below what FLOPs can tell."""
    large = ModelShape(80, 8192, 28672, 64, 8, 128256)
    work = PipelineWork(large, 8192, pipeline=4, num_microbatches=64)
    cut, reason = choose_cut(work, "1f1b", 1)
    assert cut is None
    assert reason == "null: [21, 20, 20, 19] would save 0.5% of a step, less than 3%"

    # Nothing to choose, and no even stages to fall back on.
    headless = ModelShape(8, 256, 688, 8, 8, 8)
    assert choose_cut(PipelineWork(headless, 256, 2, 4), "1f1b", 1) == (
        None,
        "null, which is balanced",
    )
    odd = ModelShape(7, 256, 688, 8, 8, 8)
    assert choose_cut(PipelineWork(odd, 256, 2, 4), "1f1b", 1)[0] == (4, 3)


def test_the_memory_of_a_schedule_is_bounded() -> None:
    """Catches a faster schedule that does not fit where 1F1B does."""
    asked = Asked("auto", 1, "auto")
    zero_bubble = PipelineChoice("zb-h1", 1, (5, 3))
    found, reason = choose_pipeline(WORK, asked, lambda choice: 100)
    assert found == zero_bubble
    assert reason.startswith("parallel.schedule auto is zb-h1: ")
    assert "; parallel.layers_per_stage auto is [5, 3]: " in reason

    def more(choice: PipelineChoice) -> int:
        return 100 if choice.schedule == "1f1b" else int(100 * MEMORY) + 1

    found, reason = choose_pipeline(WORK, asked, more)
    assert found == PipelineChoice("1f1b", 1, (5, 3))
    assert reason.startswith("parallel.schedule auto is 1f1b: zb-h1 would need 6% more memory; ")


def test_two_stages_in_a_v_are_compared_where_a_rank_may_have_two() -> None:
    """Catches a V that is never tried, one that takes more stages than allowed, and one without
    layers for its stages.
    """
    found, reason = choose_pipeline(WORK, Asked("auto", 2, "auto"), lambda choice: 1)
    assert found == PipelineChoice("zb-v", 2, (2, 3, 2, 1))
    assert reason.startswith("parallel.schedule auto is zb-v: 12.2% less time than 1f1b")
    assert choose_pipeline(WORK, Asked("auto", 3, None), lambda choice: 1)[0].schedule == "zb-v"
    assert choose_pipeline(WORK, Asked("auto", 1, "auto"), lambda choice: 1)[0].schedule == "zb-h1"
    three = replace(WORK, shape=replace(HAND, num_layers=3))
    assert ("zb-v", 2) not in Asked("auto", 2, "auto").schedules(three)
    six = replace(WORK, shape=replace(HAND, num_layers=6))
    assert ("zb-v", 2) in Asked("auto", 2, "auto").schedules(six)
    assert ("zb-v", 2) not in Asked("auto", 2, None).schedules(six)


@given(
    pipeline=st.integers(1, 4),
    num_microbatches=st.integers(1, 12),
    stages_per_rank=st.integers(1, 3),
    num_layers=st.integers(4, 13),
    vocab_size=st.sampled_from((8, 92, 400)),
    even=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_nothing_that_is_allowed_is_faster_by_more_than_it_must_be(
    pipeline: int,
    num_microbatches: int,
    stages_per_rank: int,
    num_layers: int,
    vocab_size: int,
    even: bool,
) -> None:
    """Catches a choice that cannot run, a wrong time, and a faster one passed over."""
    shape = ModelShape(num_layers, 4, 8, 2, 2, vocab_size)
    work = PipelineWork(shape, 3, pipeline, num_microbatches)
    # A rule of the config.
    even = even and num_layers % pipeline == 0
    asked = Asked("auto", stages_per_rank, None if even else "auto")
    found, _ = choose_pipeline(work, asked, lambda choice: 1)

    best = slow_simulated(work, found)
    assert simulated(work, found) == pytest.approx(best)
    allowed = [("1f1b", 1), ("zb-h1", 1)]
    if stages_per_rank > 1:
        allowed += [("zb-v", 2)]
        allowed += [("interleaved", stages_per_rank)] * (not num_microbatches % pipeline)
    for schedule, several in allowed:
        stages = pipeline * several
        fits = num_layers % stages == 0 if even else num_layers >= stages
        if (pipeline == 1 and schedule != "1f1b") or not fits:
            continue
        cut = None if even or stages == 1 else choose_cut(work, schedule, several)[0]
        other = slow_simulated(work, PipelineChoice(schedule, several, cut))
        # 1F1B stays for small gains, anything else was the fastest.
        least = (1 - PAYS) * best if found.schedule == "1f1b" else best
        assert other >= least - 1e-6


def test_a_small_model_keeps_even_stages() -> None:
    """Catches a cut for the head where the host's time, as long in every layer, decides."""
    layer = 6 * 160 + 12 * 3 * 4
    tokens = math.ceil(SMALLEST_LAYER / layer)
    asked = Asked("auto", 1, "auto")
    small, large = (replace(WORK, microbatch_tokens=tokens - less) for less in (1, 0))

    found, reason = choose_pipeline(small, asked, lambda choice: 1)
    assert found == PipelineChoice("1f1b", 1, None)
    why = "a micro-batch has 0.1 GFLOP in a layer, and below 0.1 they do not tell its time"
    told = f"parallel.schedule auto is 1f1b: {why}; parallel.layers_per_stage auto is null: {why}"
    assert reason == told
    assert choose_pipeline(large, asked, lambda choice: 1)[0] == PipelineChoice("zb-h1", 1, (5, 3))

    # Layers that do not divide: nearly even, whatever the head costs.
    odd = replace(small, shape=replace(HAND, num_layers=7, vocab_size=400))
    assert choose_cut(odd, "1f1b", 1)[0] == (4, 3)
    assert choose_cut(replace(odd, microbatch_tokens=None), "1f1b", 1)[0] == (6, 1)


def test_a_cut_says_what_memory_it_needs() -> None:
    """Catches a fuller rank that nobody is told of."""
    asked = Asked("1f1b", 1, "auto")

    def bytes_of(choice: PipelineChoice) -> int:
        return 100 if choice.layers_per_stage is None else 121

    reason = choose_pipeline(WORK, asked, bytes_of)[1]
    assert reason.endswith(" less time than even stages, 21% more memory on the fullest rank")
    odd = replace(WORK, shape=replace(HAND, num_layers=7))
    assert choose_pipeline(odd, asked, lambda choice: 1 // 0)[1].endswith("balanced by FLOPs")


def test_many_micro_batches_are_not_all_simulated() -> None:
    """Catches a time of the first ones, and a plan that takes minutes."""
    for schedule, several in (("1f1b", 1), ("zb-h1", 1), ("interleaved", 2), ("zb-v", 2)):
        for cut in (None, (5, 3) if several == 1 else (3, 2, 2, 1)):
            choice = PipelineChoice(schedule, several, cut)
            work = PipelineWork(HAND, 3, pipeline=2, num_microbatches=50)
            assert simulated(work, choice) == pytest.approx(slow_simulated(work, choice)), choice
    assert simulated(PipelineWork(HAND, 3, 2, 10**6), PipelineChoice("zb-h1", 1, None)) > 6e9


def test_what_the_config_says_is_not_chosen() -> None:
    """Catches a cut or schedule by hand that `auto` of the other one overrides."""
    by_hand = Asked("auto", 1, (6, 2))
    assert choose_pipeline(WORK, by_hand, lambda choice: 1)[0].layers_per_stage == (6, 2)
    other = Asked("zb-h2", 1, "auto")
    assert choose_pipeline(WORK, other, lambda choice: 1)[0] == PipelineChoice("zb-h2", 1, (5, 3))
    # Its last rank cannot overlap the forwards with the head: even stages are as fast.
    gpipe = Asked("gpipe", 1, "auto")
    assert choose_pipeline(WORK, gpipe, lambda choice: 1)[0] == PipelineChoice("gpipe", 1, None)
    four = Asked("auto", 2, (3, 2, 2, 1))
    assert choose_pipeline(WORK, four, lambda choice: 1)[0] == PipelineChoice(
        "interleaved", 2, (3, 2, 2, 1)
    )
