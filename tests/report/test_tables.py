"""Tables of the report: a number of another chunk, a checkpoint that is gone, a lost change."""

from dataclasses import replace
from pathlib import Path

from k2train.record.change_events import Change, KeyChange
from k2train.record.events import (
    CheckpointFollowed,
    CheckpointSaved,
    ChunkStarted,
    Resumed,
    ResumeDrilled,
    Started,
    Starting,
)
from k2train.report.collect import read_run
from k2train.report.tables import chunk_table, facts, tables, tiles, time_table
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records


def run_of_two_chunks(folder: Path) -> Path:
    saves = [
        event(CheckpointSaved, checkpoint=f"ckpt_00{n}", step=10 * n, chunks_consumed=n,
              held_out_loss=3.0 - n)
        for n in (1, 2)
    ]  # fmt: skip
    change = KeyChange(kind="rate", key="lr.peak", before="0.02", after="0.01")
    write_ledger(
        folder,
        [
            (0.0, event(Starting, attempt=1)),
            (3.0, event(Started, attempt=1, total_steps=20, parameters=2_664_576, world_size=4)),
            (4.0, event(ChunkStarted, chunk="chunk_000", order_index=0, step=1)),
            (14.0, saves[0]),
            (15.0, event(CheckpointFollowed, checkpoint="ckpt_001")),
            (15.0, event(Starting, attempt=2)),
            (16.0, event(Resumed, attempt=2, step=10, checkpoint="ckpt_001", world_size=2,
                         config_changes=("lr.peak: 0.02 -> 0.01",))),
            (16.0, Change(attempt=2, step=10, changes=(change,), why="spikes")),
            (16.5, event(ResumeDrilled, checkpoint="ckpt_001", same=True, bits=True)),
            (17.0, event(ChunkStarted, chunk="chunk_001", order_index=1, step=11)),
            (30.0, saves[1]),
        ],
    )  # fmt: skip
    rows = [step(n, loss=4.0) for n in range(1, 11)]
    rows += [replace(step(n, attempt=2, loss=2.0), chunk="chunk_001") for n in range(11, 21)]
    write_records(folder, rows)
    return folder


def test_a_chunk_has_its_own_loss_and_the_checkpoint_behind_it(tmp_path: Path) -> None:
    """Catches a table shifted by one chunk: ckpt_001 follows the first one."""
    table = chunk_table(read_run(run_of_two_chunks(tmp_path)))
    first, second = (dict(zip(table.headings, row, strict=True)) for row in table.rows)
    assert (first["chunk"], first["mean loss"], first["checkpoint"]) == (
        "chunk_000", "4.0000", "ckpt_001",
    )  # fmt: skip
    assert (first["held-out"], first["tokens"]) == ("2.0000", "1.0K")
    assert (first["replay"], first["steps"]) == ("done again, to the bit", "1 to 10")
    assert (second["mean loss"], second["held-out"]) == ("2.0000", "1.0000")
    assert (second["checkpoint"], second["replay"]) == ("ckpt_002", "-")
    # No manifest is there, and that is said.
    assert first["state root"] == "not on the disk"


def test_tiles_are_of_the_run_as_it_is(tmp_path: Path) -> None:
    """Catches key figures of the first start, or of another unit."""
    found = dict(tiles(read_run(run_of_two_chunks(tmp_path))))
    assert (found["steps"], found["tokens"], found["loss"]) == ("20 of 20", "2.0K", "2.0000")
    assert (found["processes"], found["starts"], found["parameters"]) == ("2", "2", "2.7M")
    assert found["effective training time"] == "66.7%"


def test_time_by_start_and_in_all(tmp_path: Path) -> None:
    """Catches a column under the heading of another kind."""
    table = time_table(read_run(run_of_two_chunks(tmp_path)))
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [row["start"] for row in rows] == ["1", "2", "all"]
    assert (rows[0]["useful"], rows[0]["starting"], rows[0]["steps"]) == ("10s", "3s", "1 to 10")
    assert (rows[2]["useful"], rows[2]["in all"]) == ("20s", "30s")


def test_changes_are_told(tmp_path: Path) -> None:
    """Catches a change of the config that is not on the page."""
    found = {table.title: table for table in tables(read_run(run_of_two_chunks(tmp_path)))}
    assert found["Changes of the configuration"].rows == [
        ("", "after step 10: rate: lr.peak 0.02 -> 0.01; why: spikes"),
        ("2", "lr.peak: 0.02 -> 0.01"),
    ]


def test_facts_of_a_ledger_without_details(tmp_path: Path) -> None:
    """Catches a page that needs what older ledgers lack."""
    found = dict(facts(read_run(run_of_two_chunks(tmp_path))))
    assert found["parameters"] == "2,664,576" and found["precision"] == "-"
