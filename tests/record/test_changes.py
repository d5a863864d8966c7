"""Changes by hand in a ledger: those in effect after restarts, and what was expected of them."""

from typing import Any

import pytest

from k2train.record.change_events import Change, KeyChange, Outcome
from k2train.record.changes import (
    change_lines,
    changes_in_effect,
    pending_expectations,
    unfinished_deferral,
)
from k2train.record.event import Event
from k2train.record.events import ChunkDeferred, Resumed, Started
from tests.support.events import entries, event

WORDS = "loss under 2 within 20 steps"
RATE = (KeyChange(kind="rate", key="lr.peak", before="0.1", after="0.2"),)


def change(step: int, **facts: Any) -> Change:
    return Change(**{"attempt": 1, "step": step, "changes": RATE, "expect": WORDS, **facts})


def resumed(step: int) -> Resumed:
    return event(Resumed, step=step)


def outcome(step: int, stated: int = 10) -> Outcome:
    return Outcome(
        attempt=1, step=step, expect=WORDS, stated_step=stated, due_step=30, value=1.5, met=True
    )


DEFERRED = ChunkDeferred(attempt=1, chunk="c", step=10, order_index=3, why="bad", expect=WORDS)


@pytest.mark.parametrize(
    ("events", "pending"),
    (
        ([change(10)], [10]),
        ([change(10), outcome(30)], []),
        # An outcome of another statement, and one that a start has undone.
        ([change(10), outcome(30, stated=11)], [10]),
        ([change(10), outcome(30), resumed(29)], [10]),
        ([change(10), outcome(30), resumed(30)], []),
        # The checkpoint of step 10 is older than the change made at the start from it.
        ([change(10), resumed(10)], []),
        ([change(10), resumed(11)], [10]),
        ([change(10), resumed(10), change(10)], [10]),
        # Made again without a word, and another change.
        ([change(10), resumed(10), change(10, expect=None)], [10]),
        ([change(10), resumed(10), change(10, expect=None, changes=())], []),
        ([change(10), resumed(10), change(10, expect=None, why="other")], []),
        # A deferral stays.
        ([DEFERRED, resumed(10)], [10]),
        ([DEFERRED, resumed(0), event(Started)], [10]),
        ([DEFERRED, outcome(30)], []),
        ([change(10, expect="words of a newer version")], []),
    ),
)
def test_what_is_pending(events: list[Event], pending: list[int]) -> None:
    """Catches an expectation that a restart loses, doubles, or brings back after its outcome."""
    found = pending_expectations(entries(*events))
    assert [one.stated_step for one in found] == pending
    assert {one.text for one in found} <= {WORDS}


def test_the_time_is_at_the_latest_the_end_of_the_stage() -> None:
    (one,) = pending_expectations(entries(change(10)))
    assert (one.due_step(1000), one.due_step(25)) == (30, 25)


def test_the_lines_say_everything() -> None:
    """Catches a change without its reason, and an outcome that does not say what was measured."""
    unknown = change(12, why=None, expect=None)
    ledger = entries(DEFERRED, change(10, why="spikes"), outcome(30), unknown)
    assert change_lines(ledger) == [
        "after step 10: defer: c moved to position 3 of the order; why: bad",
        f"  expected: {WORDS} (after step 10); 1.5000 at step None: met",
        "after step 10: rate: lr.peak 0.1 -> 0.2; why: spikes",
        f"  expected: {WORDS} (after step 10); 1.5000 at step None: met",
        "after step 12: rate: lr.peak 0.1 -> 0.2; no reason given",
    ]
    assert change_lines(entries(change(10)))[-1] == f"  expected: {WORDS}; not measured yet"


def test_a_deferral_without_words_is_no_change_by_hand() -> None:
    """Catches the deferrals of a policy in the list of what people did."""
    ours = ChunkDeferred(attempt=1, chunk="c", step=10, order_index=3)
    assert changes_in_effect(entries(ours)) == []


def test_a_deferral_takes_the_next_start_back() -> None:
    """Catches a start that goes on with a checkpoint that has begun the deferred chunk."""
    older = ChunkDeferred(attempt=1, chunk="d", step=5, order_index=3, why="bad")
    assert unfinished_deferral(entries(DEFERRED, older)) == 5
    assert unfinished_deferral(entries(DEFERRED, older, resumed(5))) is None
    assert unfinished_deferral(entries(resumed(5), DEFERRED)) == 10
