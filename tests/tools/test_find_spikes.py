"""Events of finished series: every kind, each file format, attempts that overlap, the picture.

Would catch a detector other than the run's, steps that were undone in a baseline, and a restart
that only its second step gives away.
"""

import gzip
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from k2train.errors import RunError
from k2train.guard.spikes import SpikeAlert
from k2train.record.metrics import MetricsWriter, StepRecord
from spike_search import generators
from spike_search.generators import Point
from spike_search.picture import svg
from spike_search.restarts import boundaries
from spike_search.search import search
from spike_search.series import Attempt, Row, Series, read_series
from tests.support.command_line import load_tool

FIRST, ONSET = 60_001, 60_600


def series(points: Sequence[Point], stride: int = 1) -> Series:
    rows = [Row(p.step, p.loss, p.grad_norm) for p in points if p.step % stride == 0]
    return Series([Attempt("1", rows)], {})


def clean(steps: int, first: int = FIRST) -> list[Point]:
    return generators.clean(steps, 0, first=first)


EVENTS: dict[str, Any] = {
    "benign": (lambda p: generators.bloom(p, ONSET), 1200),
    "malignant": (lambda p: generators.plateau(p, ONSET, 0.3), 1200),
    "drift": (lambda p: generators.rising(p, ONSET, 0.47 / 4000, 0.47), 3000),
    "nonfinite": (lambda p: generators.not_a_number(p, ONSET), 1200),
}


@pytest.mark.parametrize("kind", EVENTS)
def test_each_kind_is_found_once_at_its_onset(kind: str) -> None:
    change, steps = EVENTS[kind]
    (found,) = search(series(change(clean(steps))))
    assert found.kind == kind and found.flagged >= found.onset
    assert found.onset == ONSET if kind != "drift" else ONSET < found.onset < ONSET + 600
    back = {"benign": found.flagged + 35, "nonfinite": ONSET + 1}.get(kind)
    assert (found.closed is None) == (back is None)
    assert back is None or abs((found.closed or 0) - back) <= 15


def test_it_is_the_detector_of_the_run() -> None:
    """Catches a second implementation that drifts away from the one that trains."""
    points = generators.plateau(clean(1000), ONSET, 0.4)
    alert = SpikeAlert()
    said = [v for p in points for v in alert.observe(p.step, p.loss, p.grad_norm)]
    (found,) = search(series(points))
    assert [v.step for v in said] == [found.flagged, found.verdict]
    assert [v.kind for v in said] == ["opened", found.kind]


def test_an_event_that_the_end_cuts_off_is_told_as_it_stands() -> None:
    points = generators.plateau(clean(640), ONSET, 0.4)
    (found,) = search(series(points))
    assert (found.kind, found.closed, found.verdict) == ("malignant", None, None)


@pytest.mark.parametrize("stride", (10, 100))
def test_a_series_of_every_nth_step_counts_records_and_tells_steps(stride: int) -> None:
    onset = FIRST + 300 * stride - FIRST % stride
    points = generators.plateau(clean(450 * stride), onset, 0.3)
    (found,) = search(series(points, stride))
    assert (found.kind, found.onset) == ("malignant", onset)


def test_a_malignant_event_is_closed_where_the_loss_is_back() -> None:
    points = generators.changed(clean(1500), ONSET, lambda after: 0.4 * (after < 400))
    (found,) = search(series(points))
    assert found.kind == "malignant" and found.closed is not None
    assert ONSET + 400 <= found.closed <= ONSET + 420


def attempts(*parts: list[Point]) -> Series:
    rows = [[Row(p.step, p.loss, p.grad_norm) for p in part] for part in parts]
    return Series([Attempt(str(n), part) for n, part in enumerate(rows, 1)], {})


def test_undone_steps_leave_no_trace_in_the_baseline() -> None:
    """Catches a spike of an attempt that was given up, in the baseline of the next."""
    good = clean(1000)
    broken = generators.changed(good[:700], ONSET, lambda after: 2.0)
    spike = generators.changed(good[500:], FIRST + 900, lambda after: 1.0 * (after < 3))
    first, second = search(attempts(broken, spike))
    assert (first.attempt, first.kind, first.undone) == ("1", "malignant", True)
    assert (second.attempt, second.kind, second.onset) == ("2", "benign", FIRST + 900)
    assert abs((second.usual or 0) - generators.curve(FIRST + 900)) < 0.01 and not second.undone


@pytest.mark.parametrize(
    ("change", "verdict", "first", "equal"),
    (
        (lambda after: 0.0, "equal", None, 300),
        (lambda after: 0.0007 * (after >= 1), "lost_state", 1, 1),
        (lambda after: 9.0 * (after >= 1), "lost_state", 1, 1),
        (lambda after: 0.02, "differs_at_once", 0, 0),
        (lambda after: 0.02 * (after >= 40), "differs_later", 40, 40),
    ),
)
def test_restarts_are_compared_to_the_bit(
    change: Any, verdict: str, first: int | None, equal: int
) -> None:
    """Catches a tolerance, and a check of the first step alone."""
    good = clean(900)
    again = generators.changed(good[600:], FIRST + 600, change)
    (edge,) = boundaries(attempts(good, again))
    assert (edge.verdict, edge.overlap, edge.equal_steps) == (verdict, 300, equal)
    assert edge.first_difference == (None if first is None else FIRST + 600 + first)
    if first is not None:
        assert edge.size == pytest.approx(change(first)) and edge.column == "loss"

    # Where only the record of the same steps gives it away, it is an event too.
    kinds = [(found.kind, found.onset) for found in search(attempts(good, again))]
    lost = [("restart", FIRST + 601)] if verdict == "lost_state" else []
    assert kinds == lost


def test_one_step_or_none_in_common_proves_little() -> None:
    good = clean(900)
    (edge,) = boundaries(attempts(good[:601], good[600:]))
    assert (edge.verdict, edge.overlap) == ("one_step", 1)
    (edge,) = boundaries(attempts(good[:600], good[600:]))
    assert edge.verdict == "no_overlap"


LINES = [(1, 3.5, 1.0), (2, math.nan, 1.5), (3, 3.25, math.inf)]


@pytest.mark.parametrize(
    ("name", "text"),
    (
        ("a.csv", "step,loss,grad_norm\n1,3.5,1\n2,nan,1.5\n3,3.25,inf\n"),
        ("a.tsv", "Step\tTrain/Loss\tgradient norm\n1\t3.5\t1\n2\tNaN\t1.5\n3\t3.25\tInfinity\n"),
        ("w.csv", "_step,x,train/lm_loss,grad_norm\n1,,3.5,1\n2,,nan,1.5\n2,9,,\n3.0,,3.25,inf\n"),
        ("a.csv.gz", "iteration,lm loss,grad norm\r\n1,3.5,1\r\n2,nan,1.5\r\n3,3.25,inf\r\n"),
        (
            "m.jsonl",
            '{"step": 1, "loss": 3.5, "grad_norm": 1}\n{"step": 2, "loss": "nan", "grad_norm": '
            '1.5}\n{"step": 3, "loss": 3.25, "grad_norm": "inf"}\n{"step": 4, "lo',
        ),
    ),
)
def test_every_format_is_read_alike(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (attempt,) = read_series(path).attempts
    assert str([row[:3] for row in attempt.rows]) == str(LINES)


def test_a_run_is_read_with_its_attempts_and_skipped_steps(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    for attempt, steps in ((1, range(1, 5)), (2, range(3, 6))):
        for step in steps:
            metrics.write(StepRecord(step, attempt, loss=2.0, grad_norm=1.0, applied=step != 4))
    first, second = read_series(tmp_path).attempts
    assert [row.step for row in first.rows] == [1, 2, 3, 4] and second.first == 3
    assert [row.applied for row in second.rows] == [True, False, True]


def test_steps_that_go_back_begin_an_attempt(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("step,loss\n1,3\n2,3\n3,3\n2,3\n3,3\n")
    assert [(a.first, a.last) for a in read_series(path).attempts] == [(1, 3), (2, 3)]
    path.write_text("step,loss,attempt\n2,3,2\n1,3,1\n3,3,2\n2,3,1\n")
    assert [(a.name, a.first, a.last) for a in read_series(path).attempts] == [
        ("1", 1, 2),
        ("2", 2, 3),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    (
        ("a.csv", b"epoch,loss\n1,2\n", "no column is the step; it has epoch, loss; name one"),
        ("a.csv", b"step,accuracy\n1,2\n", "no column is the loss; it has step, accuracy"),
        ("a.csv", b"", "no column is the step; it has none"),
        ("a.csv", b"step,loss\n", "no step is on record"),
        ("a.csv", b"step,loss\n1,2\n2,x\n", "line 3 is no step: could not convert"),
        ("a.csv", b"step,loss\n1.5,2\n", "line 2 is no step: step '1.5' is not a whole number"),
        ("a.csv", b"step,loss\n\xff,2\n", "is not UTF-8 text"),
        ("a.csv.gz", b"step,loss\n", "cannot be read"),
        ("a.jsonl", b"[1]\n", "line 1 holds no object"),
        ("a.jsonl", b'{"step": 1, "loss": 2}\n{"step": 2\n', "line 2 is not JSON"),
    ),
)
def test_what_is_no_series_is_one_line(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        read_series(path)
    assert words in str(caught.value) and str(caught.value).isprintable()


def test_the_command_prints_json_lines_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = generators.plateau(clean(900), ONSET, 0.3)
    rows = "".join(f"{p.step},{p.loss!r}\n" for p in points)
    path, picture = tmp_path / "a.csv", tmp_path / "a.svg"
    path.write_text("step,train_loss\n" + rows)
    main = load_tool("find_spikes").main
    assert main([str(path), "--plot", str(picture)]) == 0
    out, told = capsys.readouterr()
    (line,) = [json.loads(text) for text in out.splitlines()]
    assert line["kind"] == "malignant" and line["onset"] == ONSET and line["closed"] is None
    assert {"flagged", "peak", "usual", "z", "channels"} <= {*line}
    assert "loss is column 'train_loss'" in told and "1 event\n" in told
    assert f"900 rows, steps {FIRST} to {FIRST + 899}, 1 attempt; 1 event\n" in told
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert main([str(path), "--restarts"]) == 0
    out, told = capsys.readouterr()
    assert out == "" and told.endswith("1 attempt; 0 restarts compared\n")
    assert main([str(tmp_path / "none.csv")]) == 2


def test_the_picture_shows_one_step_among_many_where_it_is() -> None:
    """Catches a spike that thinning drops, and marks in the wrong place."""
    noise = random.Random(0)
    rows = [Row(step, 3.0 + noise.gauss(0, 0.02)) for step in range(10_000)]
    rows[7000] = Row(7000, 8.0)
    found = [*search(Series([Attempt("1", rows)], {}))]
    picture = ElementTree.fromstring(svg(Series([Attempt("1", rows)], {}), found))
    lines = picture.iter("{http://www.w3.org/2000/svg}polyline")
    points = [
        tuple(map(float, p.split(","))) for line in lines for p in line.attrib["points"].split()
    ]
    x, y = min(points, key=lambda point: point[1])
    (mark,) = (e.attrib["d"] for e in picture.iter("{http://www.w3.org/2000/svg}path") if len(e))
    assert y < 80 and abs(float(mark.split()[0][1:]) - x) < 2
