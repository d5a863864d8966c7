"""Shutdown: what a run leaves behind, however early it ends, with parts that only take notes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, AnotherRefusedError, RunError
from k2train.guard.stop_signals import StopAsked
from k2train.launch.status import write_file
from k2train.parallel.agreement import SaveError
from k2train.plan.layout import Layout
from k2train.record.event import Event
from k2train.record.events import Failed, Stopped
from k2train.train.monitor import DamageError, RunMonitor
from k2train.train.run_logger import RunLogger
from k2train.train.shutdown import OpenRun


class Noted(RunLogger):
    """A logger that notes its events, and that it was closed."""

    attempt = 3

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.lines: list[str] = []
        self.closed = False

    def event(self, event: Event) -> None:
        self.events.append(event)

    def info(self, text: str) -> None:
        self.lines.append(text)

    def close(self) -> None:
        self.closed = True


def opened() -> tuple[OpenRun, list[tuple[Any, ...]]]:
    """A run of one process with nothing open, and what its monitor was told."""
    told: list[tuple[Any, ...]] = []
    monitor: Any = SimpleNamespace(
        phase=lambda *given: told.append(given),
        close=lambda problem="", code=0: told.append((problem, code)),
    )
    grid: Any = SimpleNamespace(layout=Layout(), comm=SimpleNamespace(broken=False))
    return OpenRun(grid, monitor), told


def test_a_mistake_before_anything_is_open() -> None:
    """Catches an error that is replaced by one about a part which does not exist yet."""
    run, told = opened()
    with pytest.raises(RunError, match="taken"), run:
        raise RunError("taken")
    assert told == [("done", 0), ("taken", EXIT_USAGE)], "no watchdog takes the exit for a death"


def test_a_mistake_is_recorded_and_everything_closed() -> None:
    """Catches a refused start that the ledger does not know, and threads that stay."""
    run, _ = opened()
    closed: list[str] = []
    logger = run.logger = Noted()
    run.batches = SimpleNamespace(close=lambda: closed.append("batches"))  # type: ignore[assignment]
    run.writer = SimpleNamespace(close=lambda: closed.append("writer"))  # type: ignore[assignment]
    run.state.step = 7
    with pytest.raises(RunError), run:
        raise RunError("taken")
    assert logger.events == [Stopped(attempt=3, reason="refused", step=7, problem="taken")]
    assert logger.closed and closed == ["batches", "writer"]


def test_what_every_rank_knows_ends_with_a_code() -> None:
    """Catches a full disk that ends in a traceback, before there is a writer or after."""
    run, told = opened()
    logger = run.logger = Noted()
    with run:
        raise SaveError("no room")
    assert run.code == EXIT_FAILED and logger.lines == ["no room"]
    assert logger.events == [Stopped(attempt=3, reason="save failed", step=0, problem="no room")]
    assert told == [("done", 0)] and logger.closed


@pytest.mark.parametrize("problem", [None, OSError("disk"), SaveError("no room")])
def test_damage_waits_for_the_save_of_an_earlier_step(problem: Exception | None) -> None:
    """Catches an end in the middle of the save that the next start resumes from, and a save that
    fails in place of the damage.
    """
    run, _ = opened()
    logger = run.logger = Noted()
    done: list[str] = []

    def wait() -> None:
        done.append(f"waited with {len(logger.events)} events")
        if problem is not None:
            raise problem

    run.writer = SimpleNamespace(wait=wait, close=lambda: done.append("closed"))  # type: ignore[assignment]
    run.state.step = 7
    with run:
        raise DamageError("replicas differ")
    assert done == ["waited with 0 events", "closed"]
    assert logger.events == [
        Stopped(attempt=3, reason="damaged", step=7, problem="replicas differ")
    ]
    assert run.code == EXIT_FAILED
    assert logger.lines == [
        "stopped at step 7: replicas differ; the last checkpoint was saved before that, start "
        "again from it"
    ]


@pytest.mark.parametrize("newest", (None, "ckpt_001_step_000051, of step 51"))
def test_an_interrupt_is_recorded_and_goes_on(newest: str | None) -> None:
    """Catches a Ctrl-C that is taken for a failure of the run, or swallowed, and one that is told
    as "without saving" although there is a checkpoint.
    """
    run, told = opened()
    logger = run.logger = Noted()
    run.writer = SimpleNamespace(newest=newest, close=lambda: None)  # type: ignore[assignment]
    run.state.step = 52
    with pytest.raises(KeyboardInterrupt) as raised, run:
        raise KeyboardInterrupt
    kept = "no checkpoint is saved" if newest is None else f"the newest checkpoint is {newest}"
    assert str(raised.value) == f"interrupted at step 52: ended at once; {kept}"
    assert logger.events == [Stopped(attempt=3, reason="interrupted", step=52)]
    assert logger.closed and told == [("done", 52)]


@pytest.mark.parametrize("told_by", ("heartbeat", "launcher", "launcher, interrupted", "nobody"))
def test_a_peer_that_left_with_a_reason_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    """Catches a mistake that one rank finds and that ends the job like a crash, told twice."""
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setenv("K2TRAIN_VERDICTS", str(tmp_path))
    if told_by.startswith("launcher"):
        code = EXIT_INTERRUPTED if "interrupted" in told_by else EXIT_USAGE
        write_file(tmp_path, 1, code)
        # A rank that a launcher ended afterwards is no cause.
        write_file(tmp_path, 2, EXIT_FAILED)
    run, _ = opened()
    run.grid.layout, run.grid.rank, run.starting = Layout(data=3), 0, False
    monitor: Any = run.monitor
    why = "chunk_001 is gone" if told_by == "heartbeat" else ""
    monitor.watchdog = SimpleNamespace(refusal=lambda: why, another_stopped=lambda: "")
    monitor.report_lost_connection = lambda error: "rank 1 died"
    logger = run.logger = Noted()
    expected = {
        "launcher, interrupted": KeyboardInterrupt,
        "nobody": SystemExit,
    }.get(told_by, AnotherRefusedError)
    with pytest.raises(expected), run:
        raise RuntimeError("[gloo] Connection closed by peer")
    (end,) = logger.events
    if told_by == "nobody":
        assert isinstance(end, Failed)
    else:
        reason = "interrupted" if "interrupted" in told_by else "refused"
        assert end == Stopped(attempt=3, reason=reason, step=0, problem=why or None)


@pytest.mark.parametrize("another", (True, False))
def test_a_sigterm_past_the_launcher(monkeypatch: pytest.MonkeyPatch, another: bool) -> None:
    """Catches a rank that is ended because another one stopped on request, told as a failure, and
    one that is ended because another one failed, told as a request.
    """
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("K2TRAIN_VERDICTS", raising=False)
    monkeypatch.setattr("os._exit", sys.exit)
    run, _ = opened()
    run.grid.rank = 0
    monitor: Any = run.monitor
    who = "SIGUSR1 on rank 1" if another else ""
    monitor.watchdog = SimpleNamespace(another_stopped=lambda: who, refusal=lambda: "")
    monitor.report_lost_connection = lambda error: f"rank 1 died ({error})"
    monitor.close = lambda problem="", stopped="": None
    logger = run.logger = Noted()
    with pytest.raises(StopAsked if another else SystemExit) as raised, run:
        raise StopAsked("SIGTERM")
    (end,) = logger.events
    if another:
        assert isinstance(end, Stopped) and end.reason == who == str(raised.value)
    else:
        assert isinstance(end, Failed) and end.problem.startswith("rank 1 died (SIGTERM during")
        assert isinstance(raised.value, SystemExit) and raised.value.code == EXIT_FAILED


@pytest.mark.parametrize(
    ("attempt", "known"), ((3, "rank 1 got SIGTERM"), (2, "[gloo] Connection closed by peer"))
)
def test_what_another_rank_has_reported_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: int, known: str
) -> None:
    """Catches a connection that broke in the place of its cause, and the report of another start:
    the rank that reports prints its line, and rank 0 alone has the ledger.
    """
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.delenv("K2TRAIN_VERDICTS", raising=False)
    report = {"line": "rank 1 got SIGTERM", "attempt": attempt}
    (tmp_path / "verdict.json").write_text(json.dumps(report))
    run, _ = opened()
    run.grid.layout, run.grid.rank, run.starting = Layout(data=2), 0, False
    monitor: Any = run.monitor
    monitor.watchdog = SimpleNamespace(
        directory=tmp_path, attempt=3, refusal=lambda: "", another_stopped=lambda: ""
    )
    monitor.report_lost_connection = lambda error: ""
    monitor.reported = lambda: RunMonitor.reported(monitor)
    logger = run.logger = Noted()
    with pytest.raises(SystemExit), run:
        raise RuntimeError("[gloo] Connection closed by peer")
    (end,) = logger.events
    assert isinstance(end, Failed) and end.problem == known
