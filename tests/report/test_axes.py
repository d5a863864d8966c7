"""Axes of the figures: tokens of undone steps, a table as long as the run, pauses as training."""

from dataclasses import replace
from pathlib import Path

from k2train.record.events import Resumed, Started
from k2train.report.axes import KNOTS, axis_table
from k2train.report.collect import read_run
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records


def test_time_is_that_of_the_steps_that_count(tmp_path: Path) -> None:
    """Catches seconds of what was undone, and a value that is not finite."""
    write_ledger(
        tmp_path,
        [(0.0, event(Started, attempt=1)), (99.0, event(Resumed, attempt=2, step=1))],
    )
    rows = [step(1, seconds=2.0), step(2, seconds=50.0), step(2, attempt=2, seconds=3.0)]
    write_records(tmp_path, [*rows, replace(step(3, attempt=2), seconds=float("nan"))])
    assert axis_table(read_run(tmp_path)) == {
        "step": [0, 1, 2, 3],
        "tokens": [0, 100, 200, 300],
        "time": [0.0, 2.0, 5.0, 5.0],
    }


def test_a_long_run_has_no_longer_table(tmp_path: Path) -> None:
    """Catches a table that grows with the run, and one without its last step."""
    write_ledger(tmp_path, [(0.0, event(Started))])
    write_records(tmp_path, [step(n) for n in range(1, 1002)])
    table = axis_table(read_run(tmp_path))
    assert len(table["step"]) <= KNOTS + 1
    assert [table[name][-1] for name in ("step", "tokens", "time")] == [1001, 100_100, 1001.0]
