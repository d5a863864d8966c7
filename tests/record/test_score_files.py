"""Held-out losses in two files: readers of steps, a kill between the files, what contradicts."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from k2train.data.trace.exposures import reads_of_chunk
from k2train.errors import RunError
from k2train.guard.failure_history import training_times
from k2train.record.held_out import HeldOutRecord, ScoresRecord
from k2train.record.jsonl import encode_line
from k2train.record.line_check import with_check
from k2train.record.metrics import (
    MetricsWriter,
    Record,
    StepRecord,
    checked_records,
    last_attempt,
    last_record,
    last_step,
    last_steps,
    latest,
    read_metrics,
    records_of_step,
)
from k2train.record.recent_steps import recent_steps
from k2train.record.score_files import (
    complete_scores,
    evaluated_sets,
    file_differences,
    read_scores,
)
from tests.support.recorded import step
from tools.spike_search.series import read_series


def scores_of(number: int, attempt: int = 1, loss: float = 2.5) -> list[HeldOutRecord]:
    """Scores of two sets, one of them by subset; a loss may be NaN."""
    own = HeldOutRecord(
        number, attempt, "held_out", loss, 24, 1, 360, {"code": 1.5, "web": math.nan}, 0.5
    )
    return [own, HeldOutRecord(number, attempt, "chunk", loss + 1, 13, 0, 195, {}, 0.25)]


def write(path: Path, records: list[Record]) -> None:
    path.write_bytes(b"".join(with_check(encode_line(one.row())) for one in records))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Steps 1 to 4, scored before the first, after the second and after the last one.

    A second start undid steps 3 and 4, and a third one did only the last score again.
    """
    metrics, held_out = tmp_path / "metrics.jsonl", tmp_path / "held_out.jsonl"
    lines: list[Record] = []
    scores: list[Record] = []
    for what in ((0, 1), 1, 2, (2, 1), 3, 4, (4, 1), -3, -4, (4, 2), (4, 3)):
        if isinstance(what, int):
            lines.append(step(abs(what), attempt=1 if what > 0 else 2, loss=abs(what)))
        else:
            evaluated = scores_of(*what, loss=what[0] + what[1] / 10)
            lines.append(ScoresRecord.of_records(evaluated))
            scores += evaluated
    write(metrics, lines)
    write(held_out, scores)
    return metrics, held_out


def test_a_line_has_the_losses_of_all_sets(files: tuple[Path, Path]) -> None:
    """Catches another form than the one that scripts read, and numbers that do not read back."""
    metrics, held_out = files
    row = json.loads(metrics.read_text().splitlines()[3])
    assert [*row] == ["step", "attempt", "held_out", "check"] and row["step"] == 2
    assert row["held_out"]["held_out"] == {
        "loss": 2.1,
        "rows": 24,
        "rows_left_out": 1,
        "targets": 360,
        "subsets": {"code": 1.5, "web": "nan"},
        "seconds": 0.5,
    }
    found = [record for _, record in evaluated_sets(metrics)]
    assert list(map(repr, found)) == list(map(repr, read_scores(held_out))) and len(found) == 10
    assert math.isnan(found[0].subsets["web"])
    lines = [line for line, one in checked_records(metrics, ScoresRecord) if one]
    assert lines == [1, 4, 7, 10, 11]


def test_no_reader_takes_them_for_a_step(files: tuple[Path, Path]) -> None:
    """Catches a step that is counted twice, without a loss, or in place of the one that is."""
    metrics, _ = files
    steps = [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2), (4, 2)]
    assert [(one.step, one.attempt) for one in read_metrics(metrics)] == steps
    assert [one.loss for one in latest(metrics)] == [1, 2, 3, 4]
    assert [(one.step, one.attempt) for one in recent_steps(metrics, 2, 4)] == [
        (2, 1),
        (3, 2),
        (4, 2),
    ]
    last = last_record(metrics)
    assert last is not None and (last.step, last.loss) == (4, 4)
    assert [one.attempt for one in records_of_step(metrics, 4)] == [1, 2]
    assert last_step(metrics) == 4 and last_steps(metrics, 1) == {1: 4, 2: 4, 3: 4}
    # A start that died in its first evaluation has a number, too.
    assert last_attempt(metrics) == 3
    assert {n: time.steps for n, time in training_times(metrics, 1).items()} == {1: 4, 2: 2}
    assert len(reads_of_chunk(metrics, "chunk_000")[0]) == 6
    assert [len(one.rows) for one in read_series(metrics).attempts] == [4, 2]


def test_what_a_kill_has_left_out_is_added(files: tuple[Path, Path]) -> None:
    """Catches a score that is in one file for ever, one that is there twice, and one of an older
    run, without a line in the metrics, that gets one.
    """
    metrics, held_out = files
    whole = held_out.read_bytes().splitlines(keepends=True)
    for kept in range(len(whole)):
        held_out.write_bytes(b"".join(whole[:kept]))
        told = [(text, note) for text, note in file_differences(metrics, held_out)]
        assert len(told) == len(whole) - kept and all(note for _, note in told)
        assert "has no line; the next start adds it" in told[0][0]
        missing = len(whole) - kept
        lines = "line" if missing == 1 else "lines"
        added = f"held_out.jsonl: {missing} {lines} added from metrics.jsonl"
        assert complete_scores(metrics, MetricsWriter(held_out)) == added
        assert held_out.read_bytes().splitlines(keepends=True) == whole
    assert complete_scores(metrics, MetricsWriter(held_out)) == ""
    assert [*file_differences(metrics, held_out)] == []

    write(metrics, [step(1), step(2)])
    assert complete_scores(metrics, MetricsWriter(held_out)) == ""
    assert [*file_differences(metrics, held_out)] == []


def changed(metrics: Path, held_out: Path) -> None:
    rows = read_scores(held_out)
    write(held_out, [replace(rows[0], subsets={"code": 1.25, "web": math.nan}), *rows[1:]])


def cut_out(metrics: Path, number: int) -> None:
    lines = metrics.read_bytes().splitlines(keepends=True)
    del lines[number]
    metrics.write_bytes(b"".join(lines))


CONTRADICTIONS: list[tuple[Callable[[Path, Path], None], list[str]]] = [
    (changed, ["line 1 has the score of set held_out at step 0, attempt 1, as 0.1 over 24 rows"]),
    (
        lambda metrics, _: cut_out(metrics, 3),
        [
            f"the score of set {name} at step 2, attempt 1, in held_out.jsonl, line {line}, has no "
            "line"
            for name, line in (("held_out", 3), ("chunk", 4))
        ],
    ),
    # Undone: nobody needs it.
    (lambda metrics, _: cut_out(metrics, 6), []),
]


@pytest.mark.parametrize(("change", "words"), CONTRADICTIONS)
def test_files_that_differ_are_told(
    files: tuple[Path, Path], change: Callable[[Path, Path], None], words: list[str]
) -> None:
    """Catches a held-out loss that was edited in one of the files, or taken out of one."""
    change(*files)
    found = [text for text, note in file_differences(*files) if not note]
    assert len(found) == len(words), found
    assert all(word in text for word, text in zip(words, found, strict=True)), found


def test_a_damaged_line_is_told_by_others(files: tuple[Path, Path]) -> None:
    """Catches a second problem for one damaged line, and a start that ends over it."""
    metrics, held_out = files
    metrics.write_bytes(metrics.read_bytes().replace(b'"rows": 24', b'"rows": 25', 1))
    assert [*file_differences(metrics, held_out)] == []
    assert complete_scores(metrics, MetricsWriter(held_out)) == ""
    with pytest.raises(RunError, match="line 1 does not match its own hash"):
        read_metrics(metrics)
    write(metrics, [StepRecord(1), Record(1, 1, other={"held_out": [1, 2]})])
    assert complete_scores(metrics, MetricsWriter(held_out)) == ""
