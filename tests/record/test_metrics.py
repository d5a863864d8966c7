"""Metrics file: restarts, non-finite values, torn lines.

Would catch rows lost or overwritten on a restart, NaN that is not JSON, and a torn line that is
kept.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.errors import RunError
from k2train.record.jsonl import encode_line, json_value
from k2train.record.metrics import (
    TAIL_BYTES,
    MetricsWriter,
    RootRecord,
    StepRecord,
    damaged_rows,
    last_attempt,
    last_record,
    last_steps,
    latest,
    lines_backwards,
    read_metrics,
    records_of_step,
)


def test_non_finite_values_are_json_in_the_file_and_floats_when_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    assert not path.exists()
    writer.write(StepRecord(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf))
    raw = json.loads(
        path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert len(raw.pop("check")) == 16
    assert (raw["step"], raw["loss"], raw["grad_norm"], raw["lr"]) == (1, "nan", "inf", "-inf")
    (record,) = read_metrics(path)
    assert math.isnan(record.loss) and record.grad_norm == math.inf and record.lr == -math.inf


RECORD = StepRecord(
    step=7,
    attempt=2,
    chunk="chunk_001",
    consumed_tokens=960,
    loss=2.5,
    grad_norm=0.5,
    lr=1e-3,
    rows=[12, 24],
    applied=True,
    tokens_per_second=100.0,
    mfu=None,
    seconds=0.25,
    peak_memory_bytes=4096,
)
LINE = (
    '{"step": 7, "attempt": 2, "chunk": "chunk_001", "consumed_tokens": 960, "loss": 2.5, '
    '"grad_norm": 0.5, "lr": 0.001, "rows": [12, 24], "applied": true, "tokens_per_second": 100.0, '
    '"mfu": null, "seconds": 0.25, "peak_memory_bytes": 4096}'
)


def test_a_line_has_the_keys_of_the_format_in_their_order() -> None:
    """Catches a line in other bytes: readers search files for the beginning of a line."""
    assert encode_line(RECORD.row()).decode() == LINE + "\n"
    with_root = encode_line(replace(RECORD, state_root="ab").row()).decode()
    assert with_root == LINE[:-1] + ', "state_root": "ab"}\n'
    roots = encode_line(RootRecord(7, 2, "ab", {"norm.weight": "cd"}).row()).decode()
    assert roots == '{"step": 7, "attempt": 2, "root": "ab", "tensors": {"norm.weight": "cd"}}\n'


@pytest.mark.parametrize("record", (RECORD, replace(RECORD, state_root="ab", mfu=0.5)))
def test_a_record_reads_back_with_all_that_is_unknown(record: StepRecord) -> None:
    row = json.loads(encode_line(record.row()))
    assert StepRecord.of(row) == record and StepRecord.of(row).row() == row
    later = row | {"later": {"a": [1]}, "worst": "-inf"}
    assert StepRecord.of(later).other == {"later": {"a": [1]}, "worst": -math.inf}
    assert json.loads(encode_line(StepRecord.of(later).row())) == later


def test_a_line_of_an_older_version_gets_defaults() -> None:
    old = StepRecord.of({"step": 3})
    assert (old.attempt, old.applied, old.mfu, old.state_root) == (0, True, None, None)
    assert math.isnan(old.loss) and math.isnan(old.seconds)


@pytest.mark.parametrize("line", ('{"loss": 1.0}', '{"step": "4"}', '{"step": 4, "attempt": null}'))
def test_a_line_that_is_of_no_step_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2 is not the record of a step"):
        read_metrics(path)


def test_each_row_is_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in (1, 2):
        writer.write(StepRecord(step))
        assert [row.step for row in read_metrics(path)][-1] == step


@pytest.mark.parametrize("rest", [b"{", b'{"step": 3}', b"x" * 200_000])
def test_a_torn_last_line_is_cut_off_on_opening(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write(StepRecord(1))
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    assert [row.step for row in read_metrics(path)] == [1]
    writer = MetricsWriter(path)
    assert writer.repaired is not None and str(len(rest)) in writer.repaired
    assert path.read_bytes() == whole
    writer.write(StepRecord(2))
    assert [row.step for row in read_metrics(path)] == [1, 2]
    assert MetricsWriter(path).repaired is None


def test_a_file_of_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step"')
    MetricsWriter(path)
    assert path.read_bytes() == b"" and last_attempt(path) == 0


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2"):
        read_metrics(path)
    with pytest.raises(RunError, match="does not exist"):
        read_metrics(tmp_path / "none.jsonl")


def test_every_changed_bit_is_named_and_ends_no_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(1, 6):
        writer.write(StepRecord(step, 1, loss=9.0 / step))
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        number = whole.count(b"\n", 0, place // 8) + 1
        with pytest.raises(RunError, match=f"metrics.jsonl: line {number} "):
            read_metrics(path)
        assert f"{path}: line {number} " in damaged_rows(path)[0]
        assert last_attempt(path) == 1


def test_a_damaged_last_newline_costs_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write(StepRecord(1))
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    writer = MetricsWriter(path)
    assert writer.repaired is not None and "newline" in writer.repaired
    writer.write(StepRecord(2))
    assert damaged_rows(path) == [
        f"{path}: line 1 is not JSON: the file was changed or damaged after it was written"
    ]
    assert b'"step": 1' in path.read_bytes()


def test_rows_from_before_there_were_checks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n')
    MetricsWriter(path).write(StepRecord(3))
    assert [row.step for row in read_metrics(path)] == [1, 2, 3] and damaged_rows(path) == []
    with path.open("ab") as stream:
        stream.write(b'{"step": 4}\n')
    assert "line 4 has no check" in damaged_rows(path)[0]


def test_attempts_stay_and_latest_gives_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_attempt(path) == 0
    writer = MetricsWriter(path)
    for attempt, steps in ((1, range(1, 5)), (2, range(3, 4))):
        for step in steps:
            writer.write(StepRecord(step, attempt, loss=attempt + step / 10))
    assert len(read_metrics(path)) == 5
    assert last_attempt(path) == 2
    assert [(row.step, row.attempt) for row in latest(path)] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 1),
    ]


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.sync()
    writer.write(StepRecord(1))
    monkeypatch.setattr(os, "fsync", synced.append)
    writer.write(StepRecord(2))
    assert synced == []
    writer.sync()
    assert len(synced) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_any_row_is_one_line_that_reads_back(row: dict[str, object]) -> None:
    line = encode_line(row)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert json.loads(line) == json_value(row)


def test_numbers_of_array_libraries_and_paths_are_taken() -> None:
    numpy = pytest.importorskip("numpy")
    row = {
        "a": numpy.float32(0.5),
        "b": numpy.int64(3),
        "c": numpy.bool_(True),
        "d": Path("x/y"),
        "e": (1, 2),
    }
    assert json.loads(encode_line(row)) == {"a": 0.5, "b": 3, "c": True, "d": "x/y", "e": [1, 2]}
    with pytest.raises(TypeError, match="ndarray"):
        encode_line({"a": numpy.zeros(2)})
    with pytest.raises(TypeError, match="object"):
        encode_line({"a": object()})


def test_single_lines_of_a_large_file_are_those_of_all(tmp_path: Path) -> None:
    """Catches a line that is found in part, another step with the same digits, and a torn last line
    taken for a record.
    """
    path = tmp_path / "metrics.jsonl"
    assert last_record(path) is None and records_of_step(path, 1) == []
    writer = MetricsWriter(path)
    for attempt in (1, 2):
        for step in range(1, 600):
            writer.write(replace(RECORD, step=step, attempt=attempt, loss=1.0 / step))
    every = read_metrics(path)
    assert path.stat().st_size > 2 * 65536
    with path.open("ab") as stream:
        stream.write(b'{"step": 60, "attempt": 3')
    assert last_record(path) == every[-1] == replace(RECORD, step=599, attempt=2, loss=1.0 / 599)
    for step in (5, 59, 60):
        assert records_of_step(path, step) == [row for row in every if row.step == step]
    assert records_of_step(path, 600) == []


@pytest.mark.parametrize(
    "harm", (lambda line: line[:-9], lambda line: line.replace(b"1.0", b"2.0"))
)
def test_a_single_line_is_checked_too(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    """Catches a reader that takes a changed digit for a number of the run."""
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write(StepRecord(1, 1, loss=1.0))
    path.write_bytes(harm(path.read_bytes()[:-1]) + b"\n")
    for read in (lambda: last_record(path), lambda: records_of_step(path, 1)):
        with pytest.raises(RunError, match="a line is damaged"):
            read()


@pytest.mark.parametrize("block_bytes", [7, 64, 1000, TAIL_BYTES])
def test_last_steps_are_those_of_all_lines(tmp_path: Path, block_bytes: int) -> None:
    """Catches a line lost between two blocks, a torn last line taken for a record, and an attempt
    before the first one asked for.
    """
    path = tmp_path / "metrics.jsonl"
    assert last_steps(path, 1) == {}
    writer = MetricsWriter(path)
    for attempt, steps in ((1, 9), (2, 3), (3, 40), (5, 1)):
        for step in range(1, steps + 1):
            writer.write(replace(RECORD, step=step, attempt=attempt))
    content = path.read_bytes()
    assert [*lines_backwards(path, block_bytes)] == content.splitlines()[::-1]
    path.write_bytes(content + b'{"step": 60, "attempt": 6, "ch')
    assert [*lines_backwards(path, block_bytes)] == content.splitlines()[::-1]
    assert last_steps(path, 1) == {1: 9, 2: 3, 3: 40, 5: 1}
    assert last_steps(path, 3) == {3: 40, 5: 1}
    path.write_bytes(b'{"step": 60')
    assert [*lines_backwards(path, block_bytes)] == []
    path.write_bytes(b"")
    assert [*lines_backwards(path, block_bytes)] == []
