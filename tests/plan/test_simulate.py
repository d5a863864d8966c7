"""Pipeline simulator against published formulas and small steps by hand.

Layouts are chosen by its bubble.
"""

import pytest

from k2train.plan.schedule import Action, Op, Program, ScheduleError, build_programs
from k2train.plan.simulate import (
    Span,
    bubble_fraction,
    constant_seconds,
    idle_seconds,
    peak_in_flight,
    simulate,
)

UNIFORM = [
    *[("gpipe", pipeline, count, 1) for pipeline in range(1, 9) for count in (1, 5, 24)],
    *[("1f1b", pipeline, count, 1) for pipeline in range(1, 9) for count in (1, 5, 24)],
    *[
        ("interleaved", pipeline, count, stages)
        for pipeline in range(1, 9)
        for count in {pipeline, 24 // pipeline * pipeline}
        for stages in (2, 4)
    ],
]


def test_uniform_bubble_is_exactly_the_published_one() -> None:
    """Catches an order that is legal but slow, and a simulator that waits where nobody waits."""
    for kind, pipeline, count, stages in UNIFORM:
        programs = build_programs(kind, pipeline, count, stages)
        computes = [
            tuple(action for action in program if action.op.is_compute) for program in programs
        ]
        spans = simulate(programs)
        total = max(span.end_seconds for span in spans)
        assert total == 3 * (stages * count + pipeline - 1), (kind, pipeline, count, stages)
        expected = (pipeline - 1) / (stages * count + pipeline - 1)
        assert bubble_fraction(spans) == pytest.approx(expected, abs=1e-12)
        assert bubble_fraction(simulate(computes)) == pytest.approx(expected, abs=1e-12)


def test_split_backwards_have_durations_of_their_own() -> None:
    """Catches halves as long as the whole, and weight gradients that somebody waits for: 2 + 3 + 3
    by hand, then 4.
    """
    programs = build_programs("zb-h1", 2, 1)
    spans = simulate(programs, constant_seconds(backward_input=3.0, backward_weight=4.0))
    times = {str(span.action): (span.start_seconds, span.end_seconds) for span in spans}
    assert times["1I0"] == (2.0, 5.0) and times["1W0"] == (5.0, 9.0)
    assert times["0I0"] == (5.0, 8.0) and times["0W0"] == (8.0, 12.0)
    assert idle_seconds(spans) == (4.0, 0.0)
    assert bubble_fraction(spans) == pytest.approx(1 - 16 / 24)


def test_activations_are_held_until_their_weight_gradients() -> None:
    """Catches memory that is freed on paper only: between I and W the inputs of the matrices
    stay.
    """
    held = parse("0F0 0F1 0I0 0I1 0F2 0W0 0W1 0I2 0W2")
    assert (peak_in_flight([held]), peak_in_flight([held], until_input=True)) == ((3,), (2,))


def parse(words: str) -> Program:
    """`0F1 0B1` -> compute actions; stages and micro-batches of one digit."""
    return tuple(Action(Op(word[1]), int(word[0]), int(word[2])) for word in words.split())


def test_most_activations_held() -> None:
    """Catches a warm-up too long by one: legal, same bubble, and out of memory on the first
    rank.
    """
    for pipeline in range(1, 9):
        for count in (1, 2, 3, 8, 24):
            one = build_programs("1f1b", pipeline, count)
            assert peak_in_flight(one) == tuple(min(count, pipeline - pp) for pp in range(pipeline))
            assert peak_in_flight(build_programs("gpipe", pipeline, count)) == (count,) * pipeline
    assert peak_in_flight(build_programs("interleaved", 4, 8, 2)) == (11, 9, 7, 5)


def test_transfers_take_time_on_the_way_there_and_back() -> None:
    """Catches a transfer that is free, or that counts as computation: 1 + 5 + 1 + 2 + 5 + 2 by
    hand.
    """
    programs = build_programs("1f1b", 2, 1)
    spans = {
        (span.rank, str(span.action)): (span.start_seconds, span.end_seconds)
        for span in _timed(programs, 5.0)
    }
    assert spans[0, "0F0"] == (0.0, 1.0)
    assert spans[0, "0SF0>1"] == spans[1, "1RF0<0"] == (1.0, 6.0)
    assert spans[1, "1F0"] == (6.0, 7.0)
    assert spans[1, "1B0"] == (7.0, 9.0)
    assert spans[0, "0B0"] == (14.0, 16.0)
    assert bubble_fraction(_timed(programs, 5.0)) == pytest.approx(1 - 6 / 32)


def _timed(programs: tuple[Program, ...], transfer: float) -> tuple[Span, ...]:
    return simulate(programs, constant_seconds(transfer=transfer))


def test_a_link_carries_one_transfer_at_a_time_and_directions_do_not_share() -> None:
    """Catches infinite bandwidth: two sends of 5 s, ready at 1 and 2 s, arrive at 6 and 11 s."""
    spans = {str(span.action): span for span in _timed(build_programs("gpipe", 2, 2), 5.0)}
    assert (spans["0SF0>1"].end_seconds, spans["0SF1>1"].end_seconds) == (6.0, 11.0)
    assert (spans["1F1"].start_seconds, spans["1B0"].start_seconds) == (11.0, 12.0)
    assert (spans["1SB0>0"].start_seconds, spans["1SB1>0"].start_seconds) == (14.0, 19.0)


def test_computation_goes_on_beside_a_transfer() -> None:
    """Catches a send that blocks its rank: the second forward starts when the first ends."""
    spans = {str(span.action): span for span in _timed(build_programs("gpipe", 2, 2), 5.0)}
    assert spans["0F1"].start_seconds == 1.0


def test_uneven_durations_are_asked_of_each_action() -> None:
    """Catches one duration for all stages: a last stage twice as slow sets the pace."""
    spans = simulate(
        build_programs("1f1b", 2, 4),
        lambda action: 0.0 if action.peer is not None else 1.0 + action.stage,
    )
    assert max(span.end_seconds for span in spans) == 1 + 8 * 2 + 1


def test_measured_spans_may_start_anywhere() -> None:
    """Catches a bubble measured from time 0: clocks of real spans start where they like."""
    spans = [
        Span(0, Action(Op.FORWARD, 0, 0), 100.0, 101.0),
        Span(1, Action(Op.FORWARD, 1, 0), 101.0, 102.0),
    ]
    assert bubble_fraction(spans) == pytest.approx(0.5)
    assert bubble_fraction([]) == 0.0


def test_a_stuck_program_is_named() -> None:
    """Catches a walk for ever, or spans of half a step."""
    with pytest.raises(ScheduleError, match="stuck: rank 0 waits at 0B0; rank 1 waits at 1B0"):
        simulate(
            [[Action(Op.BACKWARD, 0, 0), Action(Op.FORWARD, 0, 0)], [Action(Op.BACKWARD, 1, 0)]]
        )
