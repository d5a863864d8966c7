"""Measured beside planned: lanes that add up, and the term that is named, on steps made by hand."""

from dataclasses import replace

import pytest

from k2train.errors import RunError
from k2train.plan.action import Action, Op
from k2train.plan.hardware import Cluster
from k2train.plan.simulate import bubble_fraction, simulate
from k2train.plan.step_time import step_time
from k2train.planner.cluster_file import load_cluster
from k2train.planner.compare import Comparison, compare
from k2train.planner.compare_text import _lanes, sentence
from k2train.planner.lanes import BUBBLE, COMPUTE, DATA, HOST, OPTIMIZER, PIPELINE, TENSOR, measure
from k2train.planner.planned_step import (
    planned_on,
    planned_shape,
    relative_work,
    workload_of,
)
from k2train.record.action_trace import RankTrace, StepTrace
from k2train.train.setup import Setup
from tests.support.measured import measured_cluster
from tests.support.recorded_actions import LOADER, REDUCE, REST, UPDATE, recorded, setup_of

PIPELINE_4 = ("parallel.pipeline=4", "batch.global_sequences=32")
SCALE = 2e-9
"""Seconds of a FLOP a token, so that an action takes milliseconds."""


def _even(setup: Setup, action: Action) -> float:
    """Seconds in the shape of the plan, with free transfers."""
    return SCALE * relative_work(setup, (action.stage, action.op)) if action.op.is_compute else 0.0


def _compared(setup: Setup, traces: list[RankTrace]) -> Comparison:
    measured = measure(traces, setup.layout, setup.programs)
    return compare(setup, measured, planned_shape(setup, measured))


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2)],
)
def test_a_run_as_planned_has_the_planned_lanes(schedule: str, stages: int) -> None:
    """Catches a lane that is not the whole step, a bubble other than the schedule's, and a plan
    that holds and is called wrong.
    """
    keys = (f"parallel.schedule={schedule}", f"parallel.stages_per_rank={stages}")
    setup = setup_of(4, *PIPELINE_4, *keys)
    one = _compared(setup, recorded(setup, lambda action: _even(setup, action)))
    spans = simulate(setup.programs, lambda action: _even(setup, action))
    window = max(span.end_seconds for span in spans)
    whole = LOADER + window + REDUCE + UPDATE + REST
    for planned, measured in zip(one.planned_lanes, one.measured.lanes, strict=True):
        assert sum(measured.values()) == pytest.approx(whole, abs=1e-9)
        assert measured == pytest.approx(planned, abs=1e-9)
    bubble = one.measured.mean(BUBBLE) / window
    assert bubble == pytest.approx(bubble_fraction(spans), abs=1e-9) and bubble > 0.02
    assert one.measured.mean(OPTIMIZER) == pytest.approx(REDUCE + UPDATE)
    assert one.measured.loader == pytest.approx(LOADER)
    assert one.measured.between == pytest.approx(0.5)
    assert one.measured.steps == (2, 3)
    assert sentence(one).startswith("No term moves the planned step by 2%")


def test_a_slow_stage_is_named_and_not_the_waiting_that_it_causes() -> None:
    """Catches a bubble of three ranks that comes before its cause, and a cause that is halved by
    the scale of the shape.
    """
    setup = setup_of(4, *PIPELINE_4, "model.vocab_size=256")

    def slow(action: Action) -> float:
        slower = 1.6 if (action.stage, action.op) == (1, Op.FORWARD) else 1.0
        return slower * _even(setup, action)

    one = _compared(setup, recorded(setup, slow))
    first = one.rows[0]
    assert first.kind == (1, Op.FORWARD) and first.ratio == pytest.approx(1.6)
    assert first.moves is not None and first.moves > 0
    assert one.planned_seconds + first.moves == pytest.approx(one.measured.seconds, abs=1e-9)
    assert sentence(one).startswith("stage 1's forward (layers 2 to 3) took 1.60 times the plan, ")
    assert one.rows[-1].term == BUBBLE and one.rows[-1].moves is None


def test_a_slow_stage_that_nobody_waits_for_is_said_to_be_one() -> None:
    """Catches a slow stage that is not told because another one hides it: the head's, here."""
    setup = setup_of(4, *PIPELINE_4, "parallel.layers_per_stage=null")

    def slow(action: Action) -> float:
        slower = 1.6 if (action.stage, action.op) == (1, Op.FORWARD) else 1.0
        return slower * _even(setup, action)

    assert sentence(_compared(setup, recorded(setup, slow))).endswith(
        "Others hide it, but stage 1's forward (layers 2 to 3) took 1.60 times the plan."
    )


def test_exchanges_are_booked_on_their_axis() -> None:
    """Catches tensor traffic that counts as computation, and gradients that count as optimizer."""
    setup = setup_of(8, "parallel.pipeline=2", "parallel.tensor=2", "batch.global_sequences=32")

    def inside(action: Action) -> list[tuple[str, float]]:
        if action.op is Op.FORWARD:
            return [("all-gather tp", 1e-3), ("all-gather of weights dp", 2e-3)]
        return [("reduce-scatter tp", 3e-3)] if action.op is Op.BACKWARD else []

    def seconds(action: Action) -> float:
        return 0.01 if action.op.is_compute else 0.0

    one = _compared(setup, recorded(setup, seconds, exchanges=inside))
    count = setup.num_microbatches
    for lane in one.measured.lanes:
        assert lane[TENSOR] == pytest.approx(count * 4e-3)
        assert lane[DATA] == pytest.approx(count * 2e-3 + REDUCE / 2)
        assert lane[COMPUTE] == pytest.approx(count * 14e-3)
        assert lane[OPTIMIZER] == pytest.approx(REDUCE / 2 + UPDATE)
        assert lane[HOST] == pytest.approx(LOADER + REST)
    # In milliseconds, and small ones without a power of ten.
    shown = _lanes(replace(one, planned_lanes=[{**lane, DATA: 4e-5} for lane in one.planned_lanes]))
    assert "0.04" in shown[1].split() and "e-" not in "".join(shown[1:])
    assert f"{1e3 * count * 14e-3:.4g}" in shown[2].split()
    step = sum(one.measured.lanes[0].values())
    assert (
        step == pytest.approx(one.measured.seconds) == pytest.approx(one.planned_seconds, rel=0.2)
    )


def test_transfers_are_the_window_beyond_the_schedule() -> None:
    """Catches transfers that hide in the bubble."""
    setup = setup_of(4, *PIPELINE_4)

    def slow(action: Action) -> float:
        return _even(setup, action) if action.op.is_compute else 4e-3

    def window(transfer: float) -> float:
        spans = simulate(setup.programs, lambda a: _even(setup, a) if a.op.is_compute else transfer)
        return max(span.end_seconds for span in spans if span.action.op.is_compute)

    one = _compared(setup, recorded(setup, slow))
    beyond = window(4e-3) - window(0.0)
    assert beyond > 8e-3
    assert [lane[PIPELINE] for lane in one.measured.lanes] == pytest.approx([beyond] * 4)


def compared_on(cluster: Cluster, device: str, setup: Setup) -> tuple[Comparison, float]:
    """A step of 1 ms an action beside its plan, and the whole step as the search plans it."""
    measured = measure(recorded(setup, lambda a: 1e-3), setup.layout, setup.programs)
    one = compare(setup, measured, planned_on(setup, cluster, device))
    return one, step_time(workload_of(setup, cluster, device), cluster).seconds


def test_on_a_cluster_every_term_is_planned_as_the_search_plans_it() -> None:
    """Catches a second model of the step, and a term that is booked twice or lost."""
    cluster = load_cluster("a100-80gb")
    keys = ("parallel.pipeline=4", "parallel.tensor=2", "batch.global_sequences=64")
    one, whole = compared_on(cluster, "cuda", setup_of(16, *keys))
    assert one.planned_seconds == pytest.approx(whole, rel=0.02)
    assert {row.term for row in one.rows if row.planned is None} == set()
    assert [sum(lane.values()) for lane in one.planned_lanes] == pytest.approx(
        [whole] * 4, rel=0.02
    )


@pytest.mark.parametrize("keys", [(), ("parallel.tensor=2",), ("parallel.pipeline=2",)])
def test_on_a_measured_machine_its_own_lines_are_the_plan(keys: tuple[str, ...]) -> None:
    """Catches actions planned from a data sheet on a machine whose kernels were measured."""
    one, whole = compared_on(measured_cluster(), "cpu", setup_of(2, *keys))
    assert one.planned_seconds == pytest.approx(whole, rel=0.03)


def _swapped(step: StepTrace) -> StepTrace:
    """The step with two forwards in another order."""
    names = {"0F0": "0F1", "0F1": "0F0"}
    spans = (replace(span, name=names.get(span.name, span.name)) for span in step.spans)
    return replace(step, spans=tuple(spans))


def test_steps_that_are_not_the_plans_are_left_out() -> None:
    """Catches another order of actions that is averaged away, a warm-up that counts, and a mean
    over half a pipeline.
    """
    setup = setup_of(4, *PIPELINE_4)
    traces = recorded(setup, lambda action: _even(setup, action), steps=(1, 2, 3))
    first = traces[0]
    traces[0] = replace(first, steps=(*first.steps[:2], _swapped(first.steps[2])))
    measured = measure(traces, setup.layout, setup.programs)
    assert measured.steps == (2,)
    assert measured.notes == (
        "without step 1, the first of its start, which warms up",
        "without step 3: on rank 0 action 1 was 0F1, planned 0F0",
    )
    with pytest.raises(RunError, match=r"lack 1 rank of 4 \(3\), and no pipeline is whole"):
        measure(traces[:3], setup.layout, setup.programs)
    twice = replace(first.steps[1], spans=first.steps[1].spans * 2)
    traces[0] = replace(first, steps=(twice,))
    with pytest.raises(RunError, match="were done more than once, to check a result"):
        measure(traces, setup.layout, setup.programs)
    traces[0] = replace(first, steps=(replace(twice, spans=()),))
    with pytest.raises(RunError, match="action 1 was none, planned 0F0"):
        measure(traces, setup.layout, setup.programs)
