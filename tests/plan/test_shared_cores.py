"""Pipelines on shared cores: the graph's times with a core each, work conserved with fewer."""

import random

import pytest

from k2train.plan import shared_cores
from k2train.plan.action import Op
from k2train.plan.program_graph import program_graph
from k2train.plan.shared_cores import Durations, shared_seconds

CASES = [("1f1b", 4, 9, 1), ("gpipe", 3, 5, 1), ("interleaved", 4, 8, 2), ("zb-h1", 4, 9, 1)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_enough_cores_times_are_the_graphs(case: tuple[str, int, int, int]) -> None:
    """Catches an action that starts before its inputs, or later than it could."""
    draw = random.Random(str(case))
    times: dict[tuple[int, Op], float] = {}

    def seconds(stage: int, op: Op) -> float:
        return times.setdefault((stage, op), draw.uniform(0.2, 2.0))

    graph = program_graph(*case)
    expected = graph.seconds(seconds)
    assert shared_seconds(graph, seconds, 1, case[1]) == pytest.approx(expected)
    assert shared_seconds(graph, seconds, 2, 2 * case[1]) == pytest.approx(expected)


def test_one_core_does_all_the_work_of_all_ranks() -> None:
    """Catches a core that counts twice, and a share that charges a rank for others that wait."""
    graph = program_graph("1f1b", 4, 6, 1)

    def work(stage: int, op: Op) -> float:
        return {Op.FORWARD: 1.0, Op.BACKWARD: 2.0}.get(op, 0.0)

    # 4 stages x 6 micro-batches x 3: one core is never idle, so the order does not matter.
    assert shared_seconds(graph, work, 1, 1) == pytest.approx(72.0)
    # Two processes a rank on two cores: twice the work on twice the cores.
    assert shared_seconds(graph, work, 2, 2) == pytest.approx(72.0)
    # On two cores the ends of the pipeline leave one of them idle: between half and all of it.
    two = shared_seconds(graph, work, 1, 2)
    assert 36.0 < two < 0.75 * 72.0
    assert two > graph.seconds(work)


@pytest.mark.parametrize("scale", (1e-3, 1e2, 1e4, 1e7))
def test_steps_of_hours_end(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a large model on a small machine whose plan never ends: what rounding leaves of an
    action is then less than the clock can show, and time stands still.
    """
    events = 0
    advance = shared_cores._Run.advance

    def counted(self: shared_cores._Run, now: float, share: float) -> None:
        nonlocal events
        events += 1
        assert events < 10_000, "time stands still"
        advance(self, now, share)

    monkeypatch.setattr(shared_cores._Run, "advance", counted)
    draw = random.Random(3)
    for case in CASES:
        times: dict[tuple[int, Op], float] = {}

        def seconds(stage: int, op: Op, times: dict[tuple[int, Op], float] = times) -> float:
            return times.setdefault((stage, op), draw.uniform(0.2, 2.0))

        def longer(stage: int, op: Op, seconds: Durations = seconds) -> float:
            return scale * seconds(stage, op)

        graph, events = program_graph(*case), 0
        short = shared_seconds(graph, seconds, 1, 2)
        assert shared_seconds(graph, longer, 1, 2) == pytest.approx(scale * short, rel=1e-6)
