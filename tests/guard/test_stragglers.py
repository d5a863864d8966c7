"""Straggler detection: slow ranks are named soon, and noise of a busy machine names no rank."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from k2train.guard.stragglers import Stragglers
from k2train.plan.layout import Layout

LAYOUTS = [
    (Layout(data=4), None),
    (Layout(data=2), None),
    (Layout(pipeline=2, data=2), None),
    (Layout(tensor=2, pipeline=2), None),
    (Layout(pipeline=4), [1.0, 2.0, 2.0, 1.5]),
]


def busy_machine(seed: int, world: int, usual: float, steps: int) -> Iterator[list[float]]:
    """Own seconds of ranks that share cores: spread, rare long pauses, spells of a busy core."""
    rng = random.Random(seed)
    spell = [0] * world
    for _ in range(steps):
        row = []
        for rank in range(world):
            seconds = usual * rng.lognormvariate(0, 0.12)
            if rng.random() < 0.08:
                seconds += usual * min(rng.paretovariate(1.3), 50)
            if spell[rank]:
                spell[rank] -= 1
                seconds *= 1.7
            elif rng.random() < 0.005:
                spell[rank] = rng.randint(3, 12)
            row.append(seconds)
        yield row


def messages_of(
    watch: Stragglers, rows: Iterator[Sequence[float]], weights: Sequence[float] | None
) -> list[tuple[int, str]]:
    found = []
    for step, row in enumerate(rows, 1):
        line = watch.observe(
            step, [s * w for s, w in zip(row, weights or [1.0] * len(row), strict=True)]
        )
        if line:
            found.append((step, line))
    return found


@pytest.mark.parametrize(("layout", "weights"), LAYOUTS)
@pytest.mark.parametrize("usual", [0.012, 0.1])
def test_nobody_is_named_in_clean_steps(layout: Layout, weights: Any, usual: float) -> None:
    for seed in range(2):
        rows = busy_machine(seed, layout.world_size, usual, 1000)
        assert messages_of(Stragglers(layout, weights), rows, weights) == [], seed


@pytest.mark.parametrize(("layout", "weights"), LAYOUTS)
@pytest.mark.parametrize("begins", [0, 300])
@pytest.mark.parametrize("damage", ["a sleep of 50 ms", "ten times as slow"])
def test_a_slow_rank_is_named_within_20_steps(
    layout: Layout, weights: Any, begins: int, damage: str
) -> None:
    slow = layout.world_size - 1
    for seed in range(2):
        rows = []
        for step, row in enumerate(busy_machine(seed, layout.world_size, 0.012, begins + 25)):
            if step >= begins:
                row[slow] = row[slow] + 0.05 if "50 ms" in damage else row[slow] * 10
            rows.append(row)
        found = messages_of(Stragglers(layout, weights), iter(rows), weights)
        assert len(found) == 1, found
        assert found[0][1].startswith(f"rank {slow} is slow: ")
        assert begins < found[0][0] <= begins + 20


def test_the_line_has_host_and_both_times() -> None:
    watch = Stragglers(Layout(data=3), hosts=["n1", "n2", "n3"])
    lines = [watch.observe(step, [0.011, 0.011, 0.061]) for step in range(1, 21)]
    assert lines[:-1] == [None] * 19
    assert lines[-1] == (
        "rank 2 (n3) is slow: 61 ms of own work per step, the others take 11 ms (last 20 steps)"
    )


def test_a_spell_is_told_once_and_its_end_once_and_the_next_again() -> None:
    watch = Stragglers(Layout(data=3))
    rows = [[0.01, 0.01, 0.06 if 100 <= step < 200 or step >= 300 else 0.01] for step in range(400)]
    lines = [(step, line) for step, row in enumerate(rows) if (line := watch.observe(step, row))]
    assert [line.split(":")[0].split(",")[0] for _, line in lines] == [
        "rank 2 is slow",
        "rank 2 is no longer slow",
        "rank 2 is slow",
    ]
    assert 100 < lines[0][0] <= 120
    assert 200 <= lines[1][0] <= 220
    assert 300 < lines[2][0] <= 320


def test_a_rank_with_always_a_bit_more_to_do_is_not_named_until_it_changes() -> None:
    # Each a stage of its own, so there is much room between them, and little to its own past.
    watch = Stragglers(Layout(pipeline=3))
    rows = [[0.12 if step < 500 else 0.15, 0.1, 0.1] for step in range(600)]
    lines = [(step, line) for step, row in enumerate(rows) if (line := watch.observe(step, row))]
    assert len(lines) == 1
    assert lines[0][1].startswith("rank 0 is slow")
    assert 500 < lines[0][0] <= 520


def test_expected_shares_are_taken_into_account() -> None:
    weights = [1.0, 4.0]
    fair = Stragglers(Layout(pipeline=2), weights)
    assert [fair.observe(step, [0.02, 0.08]) for step in range(50)] == [None] * 50
    unfair = Stragglers(Layout(pipeline=2), weights)
    lines = [line for step in range(50) if (line := unfair.observe(step, [0.08, 0.08]))]
    assert lines == [
        "rank 0 is slow: 80 ms of own work per step, the others take 20 ms (last 20 steps)"
    ]


def test_480_ranks_cost_little_and_one_is_found() -> None:
    layout = Layout(tensor=8, pipeline=4, data=15)
    watch = Stragglers(layout)
    rows = list(busy_machine(1, 480, 0.1, 30))
    for row in rows:
        row[77] *= 3
    found = messages_of(watch, iter(rows), None)
    assert [line.split(":")[0] for _, line in found] == ["rank 77 is slow"]


def test_a_world_of_one_has_no_stragglers() -> None:
    watch = Stragglers(Layout())
    assert [watch.observe(step, [float(step % 7)]) for step in range(100)] == [None] * 100
