"""What the executor issues for every schedule, under NCCL's point-to-point rules.

Would catch a hang, or a tensor taken for another, that gloo forgives: gloo matches by tag. Needs
neither a GPU nor NCCL.
"""

from collections.abc import Sequence
from itertools import pairwise

import pytest

from k2train.plan.schedule import (
    SCHEDULES,
    Op,
    Program,
    build_programs,
    insert_transfers,
    pipeline_layout,
)
from tests.support.nccl_replay import (
    RULES,
    Compute,
    Issued,
    Rules,
    Transfer,
    Wait,
    different_orders,
    issued,
    replay,
)

STAGES = {"interleaved": (2, 4), "zb-v": (2,)}
"""Stages a rank, where a schedule needs more than one."""
CASES = [
    (kind, pipeline, turns * pipeline, stages)
    for kind in SCHEDULES
    for stages in STAGES.get(kind, (1,))
    for pipeline in (2, 3, 4, 8)
    for turns in (1, 2, 3)
]
PAIR, ONE_QUEUE = Rules("pair", False), Rules("pair", True)
PARENT = Rules("parent", False)


def programs_of(kind: str, pipeline: int, num_microbatches: int, stages: int) -> list[list[Issued]]:
    """What all ranks issue in a training step."""
    programs = build_programs(kind, pipeline, num_microbatches, stages)
    return _issued(programs, kind, pipeline, stages)


def _issued(
    programs: Sequence[Program], kind: str, pipeline: int, stages: int
) -> list[list[Issued]]:
    layout = pipeline_layout(kind, pipeline, stages)
    return [issued(program, layout, rank) for rank, program in enumerate(programs)]


def trouble(ranks: Sequence[Sequence[Issued]]) -> list[str]:
    """Everything that is wrong with what the ranks issue, under all rules."""
    found = [f"ranks {pair} see different orders" for pair in different_orders(ranks)]
    for rules in RULES:
        outcome = replay(ranks, rules)
        found += [f"{rules}: crossed: {what}" for what in outcome.crossed]
        found += [f"{rules}: stuck: {what}" for what in outcome.stuck]
    return found


@pytest.mark.parametrize(
    ("kind", "stages"), [(kind, n) for kind in SCHEDULES for n in STAGES.get(kind, (1,))]
)
def test_no_schedule_hangs_or_crosses_on_nccl(kind: str, stages: int) -> None:
    """Catches ends of a pair in different orders, and ranks that wait for each other in a circle:
    with communicators of pairs or one of the group, with many hardware queues or one.
    """
    tried = 0
    for case in CASES:
        if (case[0], case[3]) != (kind, stages):
            continue
        assert trouble(programs_of(*case)) == [], case
        tried += 1
    assert tried == 12


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_an_evaluation_does_not_hang_on_nccl(kind: str) -> None:
    """The same for programs of forwards alone."""
    stages = STAGES.get(kind, (1,))[0]
    for pipeline in (2, 4):
        layout = pipeline_layout(kind, pipeline, stages)
        forwards = [
            tuple(action for action in program if action.op is Op.FORWARD)
            for program in build_programs(kind, pipeline, 2 * pipeline, stages)
        ]
        ranks = _issued(insert_transfers(forwards, layout), kind, pipeline, stages)
        assert any(isinstance(event, Transfer) for event in ranks[0])
        assert trouble(ranks) == []


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_two_swapped_transfers_are_seen(kind: str) -> None:
    """Catches a replay that lets everything pass: any two neighbouring transfers between one pair,
    swapped on one end, must be seen as another order, and hang or be crossed.
    """
    stages = STAGES.get(kind, (1,))[0]
    programs = build_programs(kind, 3, 6, stages)
    tried = 0
    for rank, program in enumerate(programs):
        places = [n for n, action in enumerate(program) if action.peer is not None]
        for first, second in pairwise(places):
            one, other = program[first], program[second]
            # A receive cannot move behind its use, nor a send before its making.
            if one.peer != other.peer or second != first + 1:
                continue
            swapped = [*program[:first], other, one, *program[second + 1 :]]
            broken = [*programs[:rank], tuple(swapped), *programs[rank + 1 :]]
            ranks = _issued(broken, kind, 3, stages)
            assert different_orders(ranks), f"{one} and {other} of rank {rank}"
            outcome = replay(ranks, PAIR)
            assert outcome.stuck or outcome.crossed, f"{one} and {other} of rank {rank}"
            tried += 1
    assert tried > 2


def moves(*texts: str) -> list[Issued]:
    """`>1:7` sends tag 7 to rank 1, `<1:7` receives it, `w0` waits for event 0, `c` computes."""
    found: list[Issued] = []
    for text in texts:
        if text == "c":
            found.append(Compute(text))
        elif text[0] == "w":
            found.append(Wait(text, int(text[1:])))
        else:
            peer, tag = map(int, text[1:].split(":"))
            found.append(Transfer(text, peer, text[0] == ">", tag))
    return found


# What all ranks issue, and whether it ends by: pairs, pairs on one queue, the parent.
BY_HAND: tuple[tuple[str, list[list[Issued]], tuple[bool, bool, bool]], ...] = (
    ("handed over", [moves("c", ">1:0"), moves("<0:0", "w0", "c")], (True, True, True)),
    ("both send first", [moves(">1:0", "<1:1"), moves(">0:1", "<0:0")], (False, False, False)),
    (
        # Each transfer has a communicator of its own, unless the group's is used for all.
        "a circle of three",
        [moves("<2:2", ">1:0"), moves("<0:0", ">2:1"), moves("<1:1", ">0:2")],
        (True, True, False),
    ),
    (
        # Rank 0 sends only after it has waited; rank 1 has computed what it sends before.
        "a wait before a send to another",
        [moves("<1:0", "w0", ">2:1"), moves("c", ">0:0"), moves("<0:1")],
        (True, True, True),
    ),
    (
        "each waits for the one before",
        [moves("<2:0", "w0", ">1:1"), moves("<0:1", "w0", ">2:2"), moves("<1:2", "w0", ">0:0")],
        (False, False, False),
    ),
    (
        # The second send to rank 1 cannot begin while the first runs. On one queue it holds up the
        # send to rank 2, which rank 1 needs in the end.
        "a send behind one that cannot begin",
        [
            moves(">1:0", ">1:1", ">2:2"),
            moves("<2:3", "w0", "<0:0", "<0:1"),
            moves("<0:2", "w0", ">1:3"),
        ],
        (True, False, False),
    ),
)


@pytest.mark.parametrize(("name", "ranks", "ends"), BY_HAND, ids=[case[0] for case in BY_HAND])
def test_replays_by_hand(
    name: str, ranks: list[list[Issued]], ends: tuple[bool, bool, bool]
) -> None:
    """Catches rules that are milder, or stricter, than NCCL's."""
    found = tuple(not replay(ranks, rules).stuck for rules in (PAIR, ONE_QUEUE, PARENT))
    assert found == ends


def test_a_tensor_taken_for_another_is_named() -> None:
    """Catches tags that are looked at: NCCL hands over whatever comes first."""
    outcome = replay([moves(">1:0", ">1:1"), moves("<0:1", "<0:0")], PAIR)
    assert outcome.stuck == []
    assert outcome.crossed == [">1:0 met <0:1", ">1:1 met <0:0"]
