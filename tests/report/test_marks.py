"""Marks on the curves: a spike without its data, one of a branch that is gone, one never closed."""

from dataclasses import replace
from pathlib import Path

from k2train.record.change_events import Change, KeyChange
from k2train.record.events import ChunkDeferred, Resumed, Spike, StageTransition, Started
from k2train.report.collect import read_run
from k2train.report.marks import event_marks
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records

OPENED = Spike(attempt=1, policy="alert", usual_loss=2.0, kind="opened", step=3)


def test_marks_behind_the_last_step_are_left_out(tmp_path: Path) -> None:
    """Catches an axis stretched by what a return has undone."""
    write_ledger(
        tmp_path,
        [
            (0.0, event(Started)),
            (0.0, event(StageTransition, parent="runs/a", parent_step=7)),
            (1.0, event(ChunkDeferred, chunk="c", step=1, order_index=2)),
            (1.0, event(ChunkDeferred, chunk="d", step=99, order_index=3)),
        ],
    )
    write_records(tmp_path, [step(1), step(2)])
    said = [(mark.kind, mark.first, mark.text) for mark in event_marks(read_run(tmp_path))]
    assert said == [
        ("stage", 0, "from runs/a at step 7"),
        ("deferral", 1, "c moved to position 2 after step 1"),
    ]


def test_a_spike_has_its_data_and_says_whether_it_still_counts(tmp_path: Path) -> None:
    """Catches healthy steps painted red because the branch that they replaced had a spike, a
    spike that is still open without a mark, and one with the rows of another start.
    """
    closed = replace(OPENED, kind="malignant", step=6, onset=3, peak_loss=9.0)
    change = KeyChange(kind="rate", key="lr.peak", before="0.02", after="0.01")
    write_ledger(
        tmp_path,
        [
            (0.0, event(Started, attempt=1)),
            (3.0, OPENED),
            (6.0, closed),
            (7.0, event(Resumed, attempt=2, step=2, checkpoint="ckpt_001")),
            (7.0, Change(attempt=2, step=2, changes=(change,))),
            (8.0, replace(OPENED, attempt=2, step=5)),
        ],
    )
    rows = [replace(step(n), chunk="bad" if n < 5 else "later") for n in range(1, 7)]
    again = [replace(step(n, attempt=2), chunk="good") for n in range(3, 9)]
    write_records(tmp_path, [*rows, *again])
    found = event_marks(read_run(tmp_path))
    assert [(m.kind, m.first, m.last, m.undone) for m in found] == [
        ("malignant", 3, 6, True),
        ("open", 5, 8, False),
        ("restart", 2, 2, False),
        ("change", 2, 2, False),
    ]
    assert found[0].text == (
        "malignant spike, steps 3 to 6, peak loss 9, first read bad rows 3 to 3, then later, undone"
    )
    assert found[1].text == "open spike, steps 5 to 8, first read good rows 5 to 5"
    assert found[3].text == "after step 2 rate: lr.peak 0.02 -> 0.01"
