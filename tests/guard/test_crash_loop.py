"""Crash-loop detection: consecutive starts without progress.

Would catch a crash loop that never ends, and a run that is stopped although it makes progress.
"""

from pathlib import Path
from typing import Any

import pytest

from k2train.errors import RunError
from k2train.guard.crash_loop import attempts_of, check_progress, fruitless_starts
from k2train.record.event import Event, UnknownEvent
from k2train.record.events import (
    CheckpointSaved,
    ChunkStarted,
    Failed,
    Finished,
    Resumed,
    Spike,
    Started,
    Starting,
    Stopped,
)
from k2train.record.metrics import MetricsWriter, StepRecord
from tests.support.events import entries, event


def start(attempt: int, step: int = 0) -> Event:
    if step:
        return event(Resumed, attempt=attempt, step=step)
    return event(Started, attempt=attempt)


def saved_step(attempt: int, step: int, **facts: Any) -> Event:
    return event(CheckpointSaved, attempt=attempt, step=step, **facts)


def ended(kind: type[Event], attempt: int, step: int, **facts: Any) -> Event:
    return event(kind, attempt=attempt, step=step, **facts)


def asked(attempt: int, step: int) -> Event:
    return ended(Stopped, attempt, step, reason="SIGTERM")


End = tuple[type[Event], int, dict[str, Any]]
"""How a start ended: the event, its step and other facts."""
CRASHES = [start(1), saved_step(1, 0), saved_step(1, 41), start(2, 41), start(3, 41), start(4, 41)]


@pytest.mark.parametrize(
    ("events", "fruitless"),
    (
        ([], []),
        ([start(1)], [1]),
        ([start(1), saved_step(1, 0)], [1]),
        ([start(1), saved_step(1, 0), saved_step(1, 5)], []),
        (CRASHES, [2, 3, 4]),
        ([*CRASHES, saved_step(4, 46)], []),
        ([*CRASHES, saved_step(4, 46), start(5, 46)], [5]),
        # A stop that was asked for neither counts nor excuses, unless it saved something newer.
        ([*CRASHES, start(5, 41), asked(5, 41)], [2, 3, 4]),
        ([*CRASHES, start(5, 41), asked(5, 44), saved_step(5, 44)], []),
        ([*CRASHES, start(5, 41), saved_step(5, 44), asked(5, 44)], []),
        ([start(1), ended(Stopped, 1, 3, reason="non-finite")], [1]),
        ([start(1), ended(Stopped, 1, 3, reason="save failed", problem="disk full")], [1]),
        ([start(1), ended(Finished, 1, 20), start(2)], [2]),
        # A checkpoint that a kill kept out of the ledger is told by the next start, in the name of
        # the one that made it.
        ([start(1), saved_step(1, 0), saved_step(1, 5, recovered=True), start(2, 5)], [2]),
        ([start(1), saved_step(1, 0), start(2), saved_step(1, 5, recovered=True)], [2]),
        # Gone back by hand: an older beginning does not make progress of less.
        ([*CRASHES[:3], start(2, 10), saved_step(2, 15)], []),
        ([UnknownEvent(unknown="lock_taken_over", extra={"step": 9}), start(1)], [1]),
        # `starting` begins an attempt, and the event after it continues the same one.
        ([Starting(attempt=1, step=0), start(1), Starting(attempt=2, step=0)], [1, 2]),
    ),
)
def test_which_starts_got_nowhere(events: list[Event], fruitless: list[int]) -> None:
    assert [attempt.number for attempt in fruitless_starts(entries(*events))] == fruitless


@pytest.mark.parametrize(("limit", "stops"), ((0, False), (2, True), (3, True), (4, False)))
def test_the_limit(limit: int, stops: bool, tmp_path: Path) -> None:
    if not stops:
        check_progress(entries(*CRASHES), limit, tmp_path)
        return
    with pytest.raises(RunError, match=r"^3 starts in a row got no further than step 41 "):
        check_progress(entries(*CRASHES), limit, tmp_path)


@pytest.mark.parametrize(
    ("end", "message"),
    (
        (None, "killed after step 41 without an error message"),
        (
            (Failed, 44, {"problem": "rank 2 died at step 44\ndetails"}),
            r"rank 2 died at step 44 \.\.\.",
        ),
        ((Stopped, 43, {"reason": "non-finite"}), "non-finite at step 43"),
        ((ChunkStarted, 46, {}), "killed after step 46 without an error message"),
    ),
)
def test_the_line_says_how_the_last_one_ended_and_what_to_do(
    end: "End | None", message: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError) as raised:
        check_progress(entries(*(failures(end, end, end) if end else CRASHES)), 3, tmp_path)
    raised.match(
        rf"\(last: {message}\); look at {tmp_path}/ledger\.jsonl .*, then start with "
        r"run\.max_fruitless_starts=0$"
    )
    assert "\n" not in str(raised.value)


def test_one_start_is_not_a_row(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^1 start got no further than step 0 "):
        check_progress(entries(start(1)), 1, tmp_path)


def test_an_attempt_knows_where_it_came(tmp_path: Path) -> None:
    one, two = attempts_of(
        entries(
            start(1),
            saved_step(1, 5),
            ended(Spike, 1, 8),
            start(2, 5),
            saved_step(1, 8, recovered=True),
        )
    )
    assert (one.start_step, one.last_step, one.saved_step) == (0, 8, 8)
    assert (two.start_step, two.saved_step, two.is_fruitless) == (5, -1, True)


def died(rank: int, step: int) -> str:
    """The problem of a failure report, with what differs from one start to the next."""
    return (
        f"rank {rank} (pid {1000 + rank + step} on host n{rank}) died at step {step}, "
        f"forward/backward; last collective {7 * step} all-reduce dp"
    )


def failures(*problems: End) -> list[Event]:
    """A run that saved step 41, and starts from there that ended so."""
    events = [start(1), saved_step(1, 41)]
    for attempt, (kind, step, facts) in enumerate(problems, 2):
        events += [start(attempt, 41), ended(kind, attempt, step, **facts)]
    return events


def report(rank: int, step: int) -> End:
    return Failed, step, {"problem": died(rank, step)}


def heard_last(words: str, problem: str = "died at step 44") -> End:
    """A failure of which another moment was heard last."""
    return Failed, 44, {"problem": f"rank 1 (pid 7 on host n1) {problem}{words}"}


STOPS = {"reason": "non-finite"}


@pytest.mark.parametrize(
    ("ends", "refused"),
    (
        ([report(0, 44), report(1, 44), report(3, 44)], True),
        ([report(0, 44), report(1, 44), report(3, 46)], False),
        (
            [
                heard_last(", forward/backward; last collective 23"),
                heard_last(", reduce; last collective 24 all-gather of the probe's answers"),
                heard_last(", the start; no collective so far"),
            ],
            True,
        ),
        # What a rank said itself is no chance.
        (
            [
                heard_last(f", forward/backward: {error}", "failed at step 44")
                for error in ("KeyError: 'x'", "KeyError: 'x'", "ValueError")
            ],
            False,
        ),
        ([report(0, 46), report(1, 44), report(3, 44), report(0, 44)], True),
        ([report(0, 44), report(1, 44), (Stopped, 44, STOPS)], False),
        ([(Stopped, 44, STOPS)] * 3, True),
        ([(Stopped, 44, {"reason": "unavailable", "problem": "d: stale"})] * 3, False),
        ([report(0, 44), report(0, 44), (Stopped, 44, {"reason": "SIGTERM"}), report(1, 44)], True),
    ),
)
def test_only_the_same_failure_at_the_same_step_counts(
    ends: list[End], refused: bool, tmp_path: Path
) -> None:
    """Catches a healthy run refused for good because others interrupted it three times, and a loop
    that never ends because the rank that dies first is another one each time.
    """
    events = entries(*failures(*ends))
    if refused:
        with pytest.raises(RunError, match=r"^3 starts in a row got no further than step 41 "):
            check_progress(events, 3, tmp_path)
    else:
        told = check_progress(events, 3, tmp_path)
        starts = len(fruitless_starts(events))
        assert bool(told) == (starts >= 3)
        assert not told or told.startswith(f"the last {starts} starts saved nothing after step 41;")


@pytest.mark.parametrize(
    ("starts", "refused"),
    (
        # (first step, saved step, step of the failure): each saves nearer to where all of them end.
        ([(0, 20, 41), (20, 30, 41), (30, 40, 41)], True),
        ([(0, 20, 41), (20, 30, 41), (30, -1, 41)], True),
        ([(0, 20, 41), (20, 30, 40), (30, 40, 41)], False),
        # The first one got as far as it saved, and saved nothing of a step that fails.
        ([(0, 41, 41), (41, -1, 41), (41, -1, 41)], False),
        ([(0, 20, 41), (20, 30, 41)], False),
    ),
)
def test_saves_on_the_way_to_the_same_failure_are_no_progress(
    starts: list[tuple[int, int, int]], refused: bool, tmp_path: Path
) -> None:
    """Catches a crash loop that saves inside its chunk, ever nearer to the step that always fails:
    it would be begun again many times more than the limit says.
    """
    events: list[Event] = []
    for attempt, (first, saved, last) in enumerate(starts, 1):
        events += [start(attempt, first)]
        events += [saved_step(attempt, saved)] if saved >= 0 else []
        events += [ended(Failed, attempt, last, problem=died(attempt, last))]
    if refused:
        furthest = max(saved for _, saved, _ in starts)
        with pytest.raises(RunError, match=rf"got no further than step {furthest} "):
            check_progress(entries(*events), 3, tmp_path)
    else:
        assert check_progress(entries(*events), 3, tmp_path) == ""


def test_one_failure_of_a_start_that_saved_is_no_loop(tmp_path: Path) -> None:
    """Catches a limit of one that refuses a run which got on before a node died."""
    events = [start(1, 0), saved_step(1, 900), ended(Failed, 1, 950, problem=died(1, 950))]
    assert check_progress(entries(*events), 1, tmp_path) == ""


@pytest.mark.parametrize(("stopped_at", "refused"), ((35, True), (60, False)))
def test_a_stop_beyond_the_failure_ends_the_row(
    stopped_at: int, refused: bool, tmp_path: Path
) -> None:
    """What failed twice and then got past it is no crash loop when it fails again."""
    events = [
        *(start(1), saved_step(1, 20), ended(Failed, 1, 41, problem=died(0, 41))),
        *(start(2, 20), saved_step(2, 30), ended(Failed, 2, 41, problem=died(0, 41))),
        *(start(3, 30), saved_step(3, stopped_at), asked(3, stopped_at)),
        *(start(4, 30), ended(Failed, 4, 41, problem=died(0, 41))),
    ]
    if refused:
        with pytest.raises(RunError, match="3 starts in a row"):
            check_progress(entries(*events), 3, tmp_path)
    else:
        assert check_progress(entries(*events), 3, tmp_path) == ""


@pytest.mark.parametrize(("steps", "refused"), [((3, 3, 5), False), ((3, 3, 3), True)])
def test_kills_without_a_word_are_told_apart_by_the_metrics(
    steps: tuple[int, ...], refused: bool, tmp_path: Path
) -> None:
    """Three kills from outside before the first save: only their steps say that they differ."""
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for attempt, last in enumerate(steps, 1):
        for step in range(1, last + 1):
            writer.write(StepRecord(step, attempt))
    events = entries(*(start(attempt) for attempt in (1, 2, 3)))
    if refused:
        with pytest.raises(RunError, match=r"\(last: killed after step 3 without"):
            check_progress(events, 3, tmp_path)
    else:
        told = check_progress(events, 3, tmp_path)
        assert told == (
            "the last 3 starts saved nothing after step 0; they ended each time elsewhere (last at "
            "steps 3, 3, 5), so this one goes on: it is interrupted more often than it saves"
        )
