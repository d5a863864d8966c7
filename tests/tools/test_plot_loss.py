"""The loss curve: a point in the wrong place, a step drawn twice, a traceback for a mistake."""

import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from plot_loss import Curve, curve_of, svg

from k2train.errors import RunError
from k2train.record.events import CheckpointSaved
from k2train.record.ledger import Ledger
from k2train.record.metrics import MetricsWriter, StepRecord
from tests.support.command_line import HANG_SECONDS
from tests.support.events import event

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def make_run(
    directory: Path, losses: list[float], attempt: int = 1, held_out: float | None = None
) -> Path:
    metrics, ledger = MetricsWriter(directory / "metrics.jsonl"), Ledger(directory / "ledger.jsonl")
    for step, loss in enumerate(losses, start=1):
        metrics.write(StepRecord(step, attempt, loss=loss, consumed_tokens=1000 * step))
    ledger.append(event(CheckpointSaved, consumed_tokens=1000, held_out_loss=held_out))
    return directory


def test_the_latest_attempt_of_every_step_is_drawn_once(tmp_path: Path) -> None:
    """Catches steps of an attempt that was given up, and a skipped step that tears the line."""
    run = make_run(tmp_path, [9.0, 8.0, 7.0], held_out=8.5)
    make_run(tmp_path, [6.0, math.nan], attempt=2)
    assert curve_of(run, tokens_before=500.0) == Curve(
        tmp_path.name, training=[(1500.0, 6.0), (3500.0, 7.0)], held_out=[(1500.0, 8.5)]
    )


def test_points_lie_where_the_axes_say() -> None:
    """Catches an axis turned around, stages drawn over each other, and dots that are lost."""
    curves = [
        Curve("one", [(1000.0, 9.0), (2000.0, 5.0)], [(2000.0, 6.0)]),
        Curve("two <&>", [(3000.0, 4.0), (4000.0, 3.0)], []),
    ]
    picture = ElementTree.fromstring(svg(curves))
    lines = [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in picture.iter(f"{SVG}polyline")
    ]
    (first, second), (third, fourth) = lines
    assert first[0] < second[0] < third[0] < fourth[0]
    assert first[1] < second[1] < third[1] < fourth[1], (
        "SVG counts downwards: a lower loss lies lower"
    )
    assert (second[0] - first[0]) == pytest.approx(fourth[0] - third[0], abs=0.2)
    (dot,) = picture.iter(f"{SVG}circle")
    assert float(dot.attrib["cx"]) == second[0]
    assert first[1] < float(dot.attrib["cy"]) < second[1]
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert "two <&>" in texts
    assert "thousand tokens" in texts


@pytest.mark.parametrize("losses", [[5.0], [5.0, 5.0]])
def test_a_flat_curve_can_be_drawn(losses: list[float]) -> None:
    """Catches a division by a range of zero."""
    ElementTree.fromstring(
        svg([Curve("flat", [(index + 1.0, loss) for index, loss in enumerate(losses)], [])])
    )


def test_the_command_writes_the_file_or_one_line(tmp_path: Path) -> None:
    """Catches a traceback for a folder that is no run, and an exit code of 0 for it."""
    run, picture = make_run(tmp_path / "run", [9.0, 8.0]), tmp_path / "loss.svg"

    def plot(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(ROOT / "tools/plot_loss.py"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
        )

    done = plot(str(run), "--svg", str(picture))
    assert (done.returncode, done.stderr) == (0, "")
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    for arguments in (
        [str(tmp_path), "--svg", str(picture)],
        [str(run), "--svg", str(tmp_path / "no" / "x.svg")],
    ):
        refused = plot(*arguments)
        assert refused.returncode == 2
        assert re.fullmatch(r"[^\n]+\n", refused.stderr), refused.stderr


def test_a_run_without_steps_is_named(tmp_path: Path) -> None:
    """Catches an empty picture."""
    with pytest.raises(RunError, match="no step is on record"):
        curve_of(tmp_path)
