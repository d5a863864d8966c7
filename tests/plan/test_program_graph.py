"""The graph of a program: the simulator's times, for every schedule and uneven durations."""

import random

import pytest

from k2train.plan.action import Action, Op, ScheduleError
from k2train.plan.program_graph import program_graph, programs_of
from k2train.plan.schedule import build_programs
from k2train.plan.simulate import simulate

CASES = [
    ("1f1b", 1, 3, 1),
    ("1f1b", 4, 9, 1),
    ("gpipe", 3, 5, 1),
    ("interleaved", 4, 8, 3),
    ("zb-h1", 4, 9, 1),
    ("zb-h2", 4, 12, 1),
    ("zb-v", 4, 9, 2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_times_are_the_simulators(case: tuple[str, int, int, int]) -> None:
    """Catches a dependency, a link's order or a transfer that the graph leaves out."""
    kind, pipeline, count, stages = case
    draw = random.Random(str(case))
    times: dict[tuple[int, Op], float] = {}

    def seconds(stage: int, op: Op) -> float:
        return times.setdefault((stage, op), draw.uniform(0.2, 2.0))

    graph = program_graph(kind, pipeline, count, stages)
    found = graph.seconds(seconds)
    spans = simulate(build_programs(*case), lambda action: seconds(action.stage, action.op))
    computes = [span for span in spans if span.action.op.is_compute]
    assert found == pytest.approx(max(span.end_seconds for span in computes), rel=1e-12)

    own = [
        max(span.end_seconds for span in computes if span.rank == rank)
        - min(span.start_seconds for span in computes if span.rank == rank)
        for rank in range(pipeline)
    ]
    assert graph.seconds(seconds, without_barrier=True) == pytest.approx(max(own), rel=1e-12)


def test_programs_are_the_executors() -> None:
    """Catches a plan that times another list than the one that runs."""
    assert programs_of("interleaved", 4, 8, 2) == build_programs("interleaved", 4, 8, 2)
    assert Action(Op.FORWARD, 0, 0) in programs_of("1f1b", 2, 2, 1)[0]
    with pytest.raises(ScheduleError, match=r"schedule \(dual\) must be one of"):
        programs_of("dual", 2, 2, 1)
