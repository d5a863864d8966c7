"""Failure history: what the ledger and the metrics say of failures, training time and saves.

Catches waits for nodes that count as training, stops on request that count as failures, and old
ledgers or damaged clocks that end a start.
"""

from pathlib import Path
from typing import Any

import pytest

from k2train.guard import failure_history
from k2train.guard.failure_history import (
    FailureHistory,
    SaveCost,
    TrainingTime,
    read_history,
    training_times,
)
from k2train.record.event import Event
from k2train.record.events import (
    CheckpointSaved,
    ChunkStarted,
    Entry,
    Failed,
    Finished,
    Resumed,
    Started,
    Starting,
    Stopped,
)
from k2train.record.metrics import MetricsWriter, StepRecord
from tests.support.events import entries, event


def begun(attempt: int, world: int = 2, step: int = 0) -> list[Event]:
    first = Starting(attempt=attempt, step=step)
    kind = Resumed if step else Started
    more = {"step": step} if step else {}
    return [first, event(kind, attempt=attempt, world_size=world, **more)]


def saved(attempt: int, step: int, **facts: Any) -> Event:
    return event(CheckpointSaved, attempt=attempt, step=step, **facts)


def trained(path: Path, attempt: int, *seconds: float, first: int = 1) -> None:
    writer = MetricsWriter(path)
    for step, value in enumerate(seconds, first):
        writer.write(StepRecord(step, attempt, seconds=value))


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_a_history_by_hand(metrics: Path) -> None:
    """Four starts: a crash, a stop on request, a kill on another world, and the one that asks."""
    trained(metrics, 1, 4.0, 2.0)
    trained(metrics, 2, 3.0, 3.0, 3.0, first=3)
    trained(metrics, 3, 1.5, 0.5, first=6)
    trained(metrics, 4, 99.0, first=6)
    events = [
        *begun(1),
        saved(1, 0, seconds=1.0, stalled_seconds=0.25),
        saved(1, 2, seconds=2.0, stalled_seconds=0.5),
        event(Failed, attempt=1, step=2, problem="rank 1 died"),
        *begun(2, step=2),
        # A kill kept this one out of the ledger, so nobody knows its time.
        saved(1, 2, recovered=True),
        saved(2, 5, seconds=3.0),
        event(Stopped, attempt=2, step=5, reason="SIGTERM"),
        *begun(3, world=4, step=5),
        *begun(4, world=4, step=5),
    ]
    assert read_history(entries(*events), metrics, 4) == FailureHistory(
        failures=2,
        device_seconds=2 * 6.0 + 2 * 9.0 + 4 * 2.0,
        step_seconds=1.0,
        interrupted_seconds=2.0,
        # An older ledger does not know that training went on meanwhile.
        saves=(SaveCost(0.25, 1.0), SaveCost(0.5, 2.0), SaveCost(3.0, 3.0)),
    )


def test_starts_that_never_trained_do_not_count(metrics: Path) -> None:
    """A node that is broken at the start takes no training back."""
    events = [*begun(1), event(Failed, attempt=1, step=0, problem="no device"), *begun(2)]
    assert read_history(entries(*events), metrics, 3) == FailureHistory()


@pytest.mark.parametrize(
    ("end", "failures"),
    (
        (event(Stopped, attempt=1, step=1, reason="STOP file"), 0),
        # A second Ctrl-C.
        (event(Stopped, attempt=1, step=1, reason="interrupted"), 0),
        (event(Stopped, attempt=1, step=1, reason="run.stop_after_steps"), 0),
        (event(Finished, attempt=1, step=1), 0),
        (event(Stopped, attempt=1, step=1, reason="save failed", problem="disk"), 1),
        (event(Failed, attempt=1, problem="told by the next start"), 1),
        (None, 1),
    ),
)
def test_what_is_a_failure(metrics: Path, end: Event | None, failures: int) -> None:
    trained(metrics, 1, 5.0)
    events = [*begun(1), *([] if end is None else [end])]
    assert read_history(entries(*events), metrics, 2).failures == failures


def test_the_shortest_of_those_that_saved_nothing(metrics: Path) -> None:
    """Only the latest ones: a start that saved something newer ends the row."""
    for attempt, seconds in enumerate((1.0, 8.0, 30.0, 20.0), 1):
        trained(metrics, attempt, seconds)
    events = [*begun(1), *begun(2), saved(2, 1, seconds=1.0), *begun(3, step=1)]
    assert read_history(entries(*events), metrics, 3).interrupted_seconds is None
    events += begun(4, step=1)
    assert read_history(entries(*events), metrics, 5).interrupted_seconds == 20.0


def test_without_metrics_the_ledger_tells_the_time(metrics: Path) -> None:
    """From a start's first to its last event; the next start's report comes much later."""
    events = [
        *begun(1),
        event(ChunkStarted, attempt=1, step=8),
        event(Failed, attempt=1, problem="told by the next start"),
    ]
    times = ("00:00:00", "00:00:10", "00:01:30", "23:00:00")
    timed = [
        Entry(number, f"2026-11-28T{time}.000Z", "", one)
        for number, (time, one) in enumerate(zip(times, events, strict=True))
    ]
    found = read_history(timed, metrics, 2)
    assert (found.failures, found.device_seconds, found.step_seconds) == (1, 180.0, 90.0 / 8)
    # A clock that was set back, or no clock at all, measures nothing and ends nothing.
    back = [timed[2], *timed[:2], *timed[3:]]
    assert read_history(back, metrics, 2).failures == 0
    assert read_history(entries(*events), metrics, 2).failures == 0


def test_only_the_latest_failures_count(metrics: Path) -> None:
    """A bad week at the begin must not decide a year later."""
    events: list[Event] = []
    for attempt in range(1, 31):
        trained(metrics, attempt, float(attempt))
        events += begun(attempt, world=1)
    found = read_history(entries(*events), metrics, 31)
    assert (found.failures, found.device_seconds) == (16, float(sum(range(15, 31))))


def test_rows_are_read_from_the_end(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start that reads years of metrics, and a damaged row that ends it."""
    trained(metrics, 1, 1.0, 2.0)
    with metrics.open("ab") as stream:
        stream.write(b'{"step": 3, "attempt": 1, "seconds": "nan"}\nno row\n')
        stream.write(b'{"step": 3, "attempt": 1, "seconds": 1-5}\n')
    trained(metrics, 2, 0.5, 0.25)
    assert training_times(metrics, 0) == {1: TrainingTime(2, 3.0), 2: TrainingTime(2, 0.75)}
    assert training_times(metrics, 2) == {2: TrainingTime(2, 0.75)}
    monkeypatch.setattr(failure_history, "MOST_ROWS", 2)
    assert training_times(metrics, 0) == {2: TrainingTime(2, 0.75)}
    # Of a start whose rows are not all read, the ledger knows more.
    monkeypatch.setattr(failure_history, "MOST_ROWS", 1)
    assert training_times(metrics, 0) == {}
    assert training_times(metrics.with_name("none.jsonl"), 0) == {}
