"""Pipeline schedules as data: a wrong list is a hang on a cluster, or a wrong gradient."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.errors import UserError
from k2train.plan.layout import Layout
from k2train.plan.schedule import (
    SCHEDULES,
    Action,
    Op,
    Program,
    ScheduleError,
    build_programs,
    check,
    check_transfers,
    gpipe,
    insert_transfers,
    pipeline_layout,
)

Numbers = tuple[str, int, int, int]
F, B, I, W = Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741
TWO = Layout(pipeline=2)


@st.composite
def legal(draw: st.DrawFn) -> Numbers:
    """(kind, pipeline, num_microbatches, stages_per_rank) that the schedule allows."""
    kind = draw(st.sampled_from(sorted(SCHEDULES)))
    pipeline = draw(st.integers(1, 8))
    if kind != "interleaved":
        return kind, pipeline, draw(st.integers(1, 24)), 2 if kind == "zb-v" else 1
    return kind, pipeline, pipeline * draw(st.integers(1, 24 // pipeline)), draw(st.integers(2, 4))


def text(program: Program) -> str:
    return " ".join(map(str, program))


def parse(words: str) -> Program:
    """`0F1 0B1` -> compute actions; stages and micro-batches of one digit."""
    return tuple(Action(Op(word[1]), int(word[0]), int(word[2])) for word in words.split())


@given(legal())
@settings(max_examples=80, deadline=None)
def test_every_stage_runs_every_micro_batch_in_order(numbers: Numbers) -> None:
    """Catches a lost or doubled action, and an order of sums that would cost bit-equal
    gradients.
    """
    kind, pipeline, num_microbatches, stages_per_rank = numbers
    programs = build_programs(*numbers)
    assert len(programs) == pipeline

    for pp, program in enumerate(programs):
        mine = (
            (pp, 2 * pipeline - 1 - pp)
            if kind == "zb-v"
            else range(pp, pipeline * stages_per_rank, pipeline)
        )
        ops = (F, I, W) if kind.startswith("zb") else (F, B)

        for stage in mine:
            for op in ops:
                order = [
                    action.microbatch
                    for action in program
                    if (action.op, action.stage) == (op, stage)
                ]
                assert order == list(range(num_microbatches)), (kind, pp, stage)

        computes = [action for action in program if action.op.is_compute]
        assert len(computes) == len(ops) * num_microbatches * stages_per_rank


@given(legal())
@settings(max_examples=80, deadline=None)
def test_transfers_pair_up_in_one_order_and_stand_where_they_must(numbers: Numbers) -> None:
    """Catches a transfer without an end, ends in different order (an NCCL hang), a late receive, a
    late send.
    """
    programs = build_programs(*numbers)
    receives = {Op.SEND_FORWARD: (Op.RECV_FORWARD, 1), Op.SEND_BACKWARD: (Op.RECV_BACKWARD, -1)}
    for low, ours in enumerate(programs):
        for high in range(low + 1, len(programs)):
            seen = []
            for me, other, program in ((low, high, ours), (high, low, programs[high])):
                wire = []
                for action in program:
                    if action.peer != other:
                        continue
                    step = receives[action.op][1] if action.op.is_send else 0
                    forward = action.op in (Op.SEND_FORWARD, Op.RECV_FORWARD)
                    source = me if action.op.is_send else other
                    wire.append((forward, source, action.stage + step, action.microbatch))
                seen.append(wire)

            assert seen[0] == seen[1]

    last = numbers[1] * numbers[3] - 1
    for program in programs:
        for index, action in enumerate(program):
            if action.op.is_send:
                made = program[index - 1]
                assert (made.stage, made.microbatch) == (action.stage, action.microbatch)
                assert made.op in ((F,) if action.op is Op.SEND_FORWARD else (B, I))
            elif action.op in (F, B, I) and numbers[1] > 1:
                forward = action.op is F
                turns = numbers[0] == "zb-v" and action.stage == (
                    numbers[1] if forward else numbers[1] - 1
                )

                if action.stage != (0 if forward else last) and not turns:
                    wanted = Op.RECV_FORWARD if forward else Op.RECV_BACKWARD
                    assert any(
                        (r.op, r.stage, r.microbatch) == (wanted, action.stage, action.microbatch)
                        for r in program[:index]
                    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gpipe", ["0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0 1B1 1B2"]),
        ("1f1b", ["0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2"]),
    ],
)
def test_orders_by_hand(kind: str, expected: list[str]) -> None:
    """Catches a warm-up of the wrong length: legal, but with another memory or bubble."""
    programs = build_programs(kind, 2, 3)
    assert [
        text(tuple(action for action in program if action.op.is_compute)) for program in programs
    ] == expected


def test_interleaved_order_by_hand() -> None:
    """Catches blocks of the wrong size: 2(p - pp - 1) + (v - 1)p forwards first, then one and
    one.
    """
    first, second = (
        tuple(action for action in program if action.op.is_compute)
        for program in build_programs("interleaved", 2, 4, 2)
    )
    assert text(first) == "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3"
    assert text(second) == "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3"


def test_one_rank_is_a_list_like_any_other_without_transfers() -> None:
    """Catches a second path for pipeline=1, and a rank that sends to itself."""
    assert text(build_programs("1f1b", 1, 3)[0]) == "0F0 0B0 0F1 0B1 0F2 0B2"
    assert text(build_programs("interleaved", 1, 2, 2)[0]) == "0F0 1F0 1B0 0F1 0B0 1F1 1B1 0B1"


def test_transfers_by_hand_and_how_actions_print() -> None:
    """Catches a peer or stage that is the other end's."""
    first, second = build_programs("1f1b", 2, 2)
    assert text(first) == "0F0 0SF0>1 0F1 0SF1>1 0RB0<1 0B0 0RB1<1 0B1"
    assert text(second) == "1RF0<0 1RF1<0 1F0 1B0 1SB0>0 1F1 1B1 1SB1>0"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            ("interleaved", 4, 6, 2),
            r"micro-batches \(6\) divisible by parallel.pipeline \(4\); nearest that are: 4, 8",
        ),
        (("interleaved", 4, 3, 2), r"micro-batches \(3\).*nearest that are: 4 "),
        (("interleaved", 4, 8, 1), r"stages_per_rank \(1\) of at least 2.*schedule=1f1b"),
        (("1f1b", 4, 8, 2), r"stages_per_rank \(2\) to be 1.*schedule=interleaved"),
        (("1f1p", 4, 8, 1), r"\(1f1p\) must be one of: gpipe, 1f1b, interleaved"),
        (("gpipe", 2, 0, 1), r"micro-batches \(0\)"),
        (
            ("zb-h1", 2, 4, 2),
            r"\(zb-h1\) needs .*stages_per_rank \(2\) to be 1; .*schedule=interleaved or zb-v$",
        ),
        (
            ("zb-h2", 2, 4, 3),
            r"\(zb-h2\) needs .*stages_per_rank \(3\) to be 1; .*schedule=interleaved$",
        ),
        (("zb-v", 2, 4, 1), r"\(zb-v\) needs parallel.stages_per_rank \(1\) to be 2$"),
    ],
)
def test_impossible_numbers_are_named(numbers: Numbers, message: str) -> None:
    """Catches a traceback, or an empty program, where the user needs the knob and the way."""
    with pytest.raises(ScheduleError, match=message) as caught:
        build_programs(*numbers)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (["0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"], r"rank 1 must run 1F .* in order, not \[1, 0\]"),
        (["0F0 0F1 0B1 0B0", "1F0 1F1 1B0 1B1"], r"rank 0 must run 0B .* in order, not \[1, 0\]"),
        (
            ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1"],
            r"rank 1 must run 1B of micro-batches 0 to 1 .* not \[0\]",
        ),
        (["0F0 0F1 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"], r"rank 0 must run 0F .* not \[0, 1, 1\]"),
        (["0F0 0F1 0B0 0B1", "0F0 1F0 1B0 1F1 1B1"], r"rank 1 runs 0F0, but does not hold stage 0"),
        (
            ["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"],
            r"stuck after 2 actions: rank 0 waits at 0B0 for 1B0; rank 1 waits at 1F1 for 0F1$",
        ),
        (["0F0 0F1 0I0 0W0 0I1", "1F0 1B0 1F1 1B1"], r"rank 0 must run 0W .* not \[0\]"),
        (
            ["0F0 0F1 0I0 0I1 0W1 0W0", "1F0 1B0 1F1 1B1"],
            r"rank 0 must run 0W .* in order, not \[1, 0\]",
        ),
        (
            ["0F0 0F1 0I0 0B1 0W0", "1F0 1B0 1F1 1B1"],
            r"rank 0 must run 0W .* in order, not \[1, 0\]",
        ),
        (
            ["0F0 0F1 0I1 0W1 0I0 0W0", "1F0 1B0 1F1 1B1"],
            r"rank 0 must run 0I .* in order, not \[1, 0\]",
        ),
        (["0F0 0F1 0I0 0W0 0W0 0I1", "1F0 1B0 1F1 1B1"], r"rank 0 must run 0W .* not \[0, 0\]"),
        (["0F0 0F1 0B0 0W0 0B1", "1F0 1B0 1F1 1B1"], r"rank 0 runs 0W0, but no 0I0"),
        (["0F0 0F1 0B0 0I1", "1F0 1B0 1F1 1B1"], r"rank 0 must run 0W .* not \[0\]"),
        (
            ["0F0 0F1 0W0 0I0 0I1 0W1", "1F0 1B0 1F1 1B1"],
            r"rank 0 waits at 0W0 for 0I0; rank 1 waits at 1F1|waits at 0W0 for 0I0$",
        ),
        (
            ["0F0 0I0 0F1 0I1 0W0 0W1", "1F0 1F1 1I0 1I1 1W0 1W1"],
            r"rank 0 waits at 0I0 for 1I0; rank 1",
        ),
        (["0F0 0F1 0B0 0B1", "1B0 1F0 1F1 1B1"], r"stuck after 2 .*rank 1 waits at 1B0 for 1F0"),
    ],
)
def test_a_bad_list_is_named_not_hung(lists: list[str], message: str) -> None:
    """Catches a checker that passes a bad list, walks for ever, or does not say who waits for
    what.
    """
    with pytest.raises(ScheduleError, match=message):
        check([parse(words) for words in lists], TWO, num_microbatches=2)


def test_a_backward_may_be_whole_for_one_micro_batch_and_split_for_another() -> None:
    """Catches a checker that wants all or nothing: where a W would follow its I at once, one action
    is the same.
    """
    lists = [parse(words) for words in ("0F0 0F1 0I0 0W0 0B1", "1F0 1B0 1F1 1I1 1W1")]
    check(lists, TWO, num_microbatches=2)
    check_transfers(insert_transfers(lists, TWO), TWO)


def test_the_rank_at_the_turn_of_a_v_sends_nothing_there() -> None:
    """Catches a V placed as a loop: its last stage on the wrong rank, and a rank that sends to
    itself.
    """
    first, second = build_programs("zb-v", 2, 1, 2)
    assert text(first) == "0F0 0SF0>1 3RF0<1 3F0 3I0 3SB0>1 3W0 0RB0<1 0I0 0W0"
    assert text(second) == "1RF0<0 1F0 2F0 2SF0>0 2RB0<0 2I0 2W0 1I0 1SB0>0 1W0"


def planted(change: Callable[[list[list[Action]]], None]) -> list[list[Action]]:
    programs = [list(program) for program in insert_transfers(gpipe(2, 2), TWO)]
    change(programs)
    return programs


def test_planted_transfer_faults_are_named() -> None:
    """Catches a missing end, ends in different order, a use before its receive and a send nobody
    waits for.
    """
    check_transfers(planted(lambda programs: None), TWO)

    def drop(programs: list[list[Action]]) -> None:
        programs[1].remove(Action(Op.RECV_FORWARD, 1, 1, 0))

    def late(programs: list[list[Action]]) -> None:
        receive = Action(Op.RECV_FORWARD, 1, 1, 0)
        programs[1].remove(receive)
        programs[1].append(receive)

    def swap(programs: list[list[Action]]) -> None:
        first, second = (
            programs[1].index(Action(Op.RECV_FORWARD, 1, microbatch, 0)) for microbatch in (0, 1)
        )
        programs[1][first], programs[1][second] = programs[1][second], programs[1][first]

    def twice(programs: list[list[Action]]) -> None:
        programs[0].append(Action(Op.SEND_FORWARD, 0, 0, 1))

    def stray(programs: list[list[Action]]) -> None:
        programs[0].append(Action(Op.SEND_FORWARD, 0, 7, 1))

    for change, message in (
        (drop, "rank 1 must have 1RF1<0 before 1F1"),
        (late, "rank 1 must have 1RF1<0 before 1F1"),
        (swap, "ranks 0 and 1 disagree on their transfer 0: rank 0 has 0SF0>1, rank 1 has 1RF1<0"),
        (twice, "rank 0 has 0SF0>1 more than once"),
        (stray, "rank 0 has the transfer 0SF7>1, which no compute action needs"),
    ):
        with pytest.raises(ScheduleError, match=message):
            check_transfers(planted(change), TWO)


def test_a_circle_of_blocking_transfers_is_named() -> None:
    """Catches ranks that wait in a circle while each pair agrees: a deadlock that no look at pairs
    can see.
    """
    programs = [list(program) for program in build_programs("interleaved", 3, 3, 2)]
    receive = Action(Op.RECV_FORWARD, 3, 0, 2)
    programs[0].remove(receive)
    programs[0].insert(0, receive)
    with pytest.raises(
        ScheduleError, match="stuck after 0 actions: rank 0 waits at 3RF0<2; rank 1 waits at 1RF0<0"
    ):
        check_transfers(programs, pipeline_layout("interleaved", 3, 2))


def test_transfers_of_forwards_alone() -> None:
    """Catches an evaluation step that cannot be made: the forwards of a schedule are a list like
    any other.
    """
    for numbers in (
        ("1f1b", 3, 2, 1),
        ("interleaved", 2, 4, 2),
        ("gpipe", 1, 2, 1),
        ("zb-h2", 2, 4, 1),
    ):
        pipeline, stages_per_rank = numbers[1], numbers[3]
        layout = pipeline_layout(numbers[0], pipeline, stages_per_rank)
        forwards = [
            [a for a in program if a.op is Op.FORWARD] for program in build_programs(*numbers)
        ]
        programs = insert_transfers(forwards, layout)
        check_transfers(programs, layout)
        assert not any(
            a.op in (Op.BACKWARD, Op.SEND_BACKWARD, Op.RECV_BACKWARD)
            for program in programs
            for a in program
        )
        sends = sum(a.op is Op.SEND_FORWARD for program in programs for a in program)
        assert sends == (0 if pipeline == 1 else numbers[2] * (pipeline * stages_per_rank - 1))
