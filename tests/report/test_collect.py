"""A run as it is on record: undone steps that count, a damaged file that hides the rest."""

from dataclasses import replace
from pathlib import Path

import pytest

from k2train.errors import RunError
from k2train.record.events import CheckpointSaved, ChunkStarted, Finished, Resumed, Started, Stopped
from k2train.record.held_out import HeldOutRecord
from k2train.record.rollback_events import RolledBack
from k2train.report.collect import read_run
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records


def test_the_curve_is_that_of_the_run_as_it_is_now(tmp_path: Path) -> None:
    """Catches steps and scores of an attempt that was given up drawn as the run's own."""
    write_ledger(
        tmp_path,
        [
            (0.0, event(Started, attempt=1, total_steps=10)),
            (9.0, event(Resumed, attempt=2, step=2, total_steps=12)),
        ],
    )
    undone = [step(3, loss=7.0), step(4, loss=8.0)]
    again = [replace(step(3, loss=5.0), attempt=2)]
    scores = [
        HeldOutRecord(2, 1, "held_out", 4.0, 1, 0, 9),
        # Of the start that was given up: before its end, and behind it.
        HeldOutRecord(3, 1, "held_out", 8.5, 1, 0, 9),
        HeldOutRecord(4, 1, "held_out", 9.0, 1, 0, 9),
        HeldOutRecord(2, 2, "held_out", 4.5, 1, 0, 9),
    ]
    write_records(tmp_path, [step(1), step(2), *undone, *again], scores)
    run = read_run(tmp_path)
    assert [(r.step, r.loss) for r in run.kept] == [(1, 2.0), (2, 2.0), (3, 5.0)]
    assert [r.loss for r in run.undone] == [7.0, 8.0]
    assert [(s.step, s.loss) for s in run.kept_scores] == [(2, 4.5)]
    assert (run.last_step, run.total_steps) == (3, 12)
    assert run.status == "not finished, 2 starts"


def test_chunks_after_a_return_are_those_of_the_new_order(tmp_path: Path) -> None:
    """Catches a deferred chunk shown where it was read the first time."""
    back = event(
        RolledBack, step=10, from_step=30, chunks=("b",), order_index=2, checkpoint="ckpt_001"
    )
    write_ledger(
        tmp_path,
        [
            (0.0, event(Started, attempt=1)),
            (1.0, event(ChunkStarted, chunk="a", order_index=0, step=1)),
            (2.0, event(ChunkStarted, chunk="b", order_index=1, step=11)),
            (3.0, back),
            (4.0, event(ChunkStarted, chunk="c", order_index=1, step=11)),
            (5.0, event(Finished, step=30)),
        ],
    )
    run = read_run(tmp_path)
    assert [(c.order_index, c.chunk) for c in run.chunks] == [(0, "a"), (1, "c")]
    assert run.status == "finished, 1 start"


def test_the_newer_of_two_saves_counts(tmp_path: Path) -> None:
    """Catches a checkpoint listed twice, or with the loss of the one that was replaced."""
    saves = [
        event(CheckpointSaved, checkpoint="ckpt_001", step=5, held_out_loss=3.0),
        event(CheckpointSaved, checkpoint="ckpt_000", step=0),
        event(CheckpointSaved, checkpoint="ckpt_001", step=5, held_out_loss=2.0),
    ]
    write_ledger(tmp_path, [(0.0, event(Started)), *((1.0, save) for save in saves)])
    run = read_run(tmp_path)
    assert [(c.checkpoint, c.held_out_loss) for c in run.checkpoints][1] == ("ckpt_001", 2.0)
    assert len(run.checkpoints) == 2


def test_checkpoints_that_a_start_set_aside_are_gone(tmp_path: Path) -> None:
    """Catches the checkpoint of a branch that is gone beside the chunks of the new one."""
    write_ledger(
        tmp_path,
        [
            (0.0, event(Started)),
            (1.0, event(CheckpointSaved, checkpoint="ckpt_001", step=5)),
            (2.0, event(CheckpointSaved, checkpoint="ckpt_002", step=10)),
            (3.0, event(Resumed, attempt=2, step=5, checkpoint="ckpt_001")),
        ],
    )
    assert [saved.checkpoint for saved in read_run(tmp_path).checkpoints] == ["ckpt_001"]


def test_what_is_missing_beside_the_ledger_is_a_note(tmp_path: Path) -> None:
    """Catches a report that cannot be had because one line of the metrics rotted."""
    write_ledger(tmp_path, [(0.0, event(Started)), (1.0, event(Stopped, step=2, reason="asked"))])
    write_records(tmp_path, [step(1), step(2)])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"loss": 2.0', b'"loss": 3.0', 1))
    run = read_run(tmp_path)
    assert [record.step for record in run.kept] == [2]
    assert run.notes[0] == "1 damaged line of metrics.jsonl left out"
    assert run.notes[1].startswith("no config: config.yaml")
    assert run.status == "stopped at step 2 (asked), 1 start"


def test_refused(tmp_path: Path) -> None:
    """Catches a traceback for a folder that is no run, and for a changed ledger."""
    with pytest.raises(RunError, match="is not a directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"ledger\.jsonl"):
        read_run(tmp_path)
    write_ledger(tmp_path, [(0.0, event(Started)), (1.0, event(Finished))])
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"finished"', b'"started!"'))
    with pytest.raises(RunError, match="line 2"):
        read_run(tmp_path)
