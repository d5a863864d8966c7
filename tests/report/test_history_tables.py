"""Tables of a run's history: an end of another start, a spike without its rows, a change twice."""

from dataclasses import replace
from pathlib import Path

from k2train.record.events import Failed, Finished, Resumed, Spike, Started
from k2train.record.rollback_events import RolledBack
from k2train.report.collect import RunView, read_run
from k2train.report.history_tables import changes_table, events_table, layout_text, starts_table
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records

LAYOUT = "Layout(tensor=2, pipeline=1, data=4, stages_per_rank=1)"
CHANGED = ("lr.peak: 0.02 -> 0.01",)


def run_of_four_starts(folder: Path) -> RunView:
    spike = Spike(attempt=3, policy="alert", usual_loss=2.0, kind="opened", step=5, loss=7.25)
    resumed = [
        event(Resumed, attempt=n, step=2, checkpoint="ckpt_001", world_size=8, layout=LAYOUT,
              config_changes=CHANGED)
        for n in (2, 3, 4)
    ]  # fmt: skip
    write_ledger(
        folder,
        [
            (0.0, event(Started, attempt=1, world_size=8, layout=LAYOUT)),
            (9.0, resumed[0]),
            (9.5, event(Failed, attempt=2, problem="rank 3 died")),
            (20.0, resumed[1]),
            (21.0, spike),
            (22.0, replace(spike, kind="malignant", step=6, onset=5, peak_loss=8.0)),
            (22.0, event(RolledBack, attempt=3, step=2, from_step=6, checkpoint="ckpt_001",
                         chunks=("bad",), verdict="malignant")),
            (23.0, resumed[2]),
            (40.0, event(Finished, attempt=4, step=6)),
        ],
    )  # fmt: skip
    rows = [replace(step(n, attempt=3), chunk="bad") for n in range(3, 7)]
    again = [step(n, attempt=4) for n in range(3, 7)]
    write_records(folder, [step(1), step(2), step(3), *rows, *again])
    return read_run(folder)


def test_every_start_has_its_own_end(tmp_path: Path) -> None:
    """Catches a killed start shown as finished, and an end given to the start that recorded it."""
    table = starts_table(run_of_four_starts(tmp_path))
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [row["end"] for row in rows] == [
        "no end on record: killed, or a lost node",
        "failed: rank 3 died",
        "went back at step 6",
        "finished",
    ]
    assert [row["from"] for row in rows] == ["-", "ckpt_001", "ckpt_001", "ckpt_001"]
    assert [row["steps"] for row in rows] == ["1 to 3", "-", "3 to 6", "3 to 6"]
    assert {(row["layout"], row["processes"]) for row in rows} == {
        ("tensor 2, pipeline 1, data 4", "8")
    }
    assert layout_text("something else") == "something else"


def test_a_spike_is_told_with_what_it_read(tmp_path: Path) -> None:
    """Catches a table of events that leaves the search for the data to the reader."""
    said = [row[2] for row in events_table(run_of_four_starts(tmp_path)).rows]
    data = "usual loss 2; first read bad rows 5 to 5"
    assert f"spike: opened; loss 7.25; {data}" in said
    assert f"spike: malignant since step 5; peak loss 8; {data}" in said
    assert "return to ckpt_001; deferred: bad; malignant" in said


def test_a_change_is_told_once(tmp_path: Path) -> None:
    """Catches the changes of a start repeated for every return within it."""
    assert changes_table(run_of_four_starts(tmp_path)).rows == [("2", CHANGED[0])]
