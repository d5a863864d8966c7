"""Layouts of a check, and the table of predicted beside measured steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from k2train.calibrate import check as check_module
from k2train.calibrate.check import (
    LAYOUTS,
    Case,
    Checked,
    check,
    check_lines,
    parse_layout,
    rank_correlation,
    ranks_of,
)
from k2train.calibrate.workload import workload_of
from k2train.config.load import load_config
from k2train.errors import ConfigError
from k2train.plan.uncertainty import Interval
from tests.support.measured import measured_cluster

DEMO = str(Path(__file__).resolve().parents[2] / "configs" / "demo" / "stage1.yaml")


def checked(predicted: float, measured: float) -> Checked:
    interval = Interval(predicted, predicted / 1.2, predicted * 1.2, {}, True)
    return Checked(Case("data=1", (), 1), interval, measured, 0.9 * measured, 1.1 * measured)


def test_layouts_are_configs_on_a_world() -> None:
    """Catches a degree that changes the config and not the world, and a shipped layout that the
    demo cannot run."""
    case = parse_layout("tensor=2,pipeline=2,data=3,sequence=false")
    assert case.world_size == 12
    assert case.overrides == (
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.sequence=false",
    )
    for text in LAYOUTS:
        one = parse_layout(text)
        work = workload_of(load_config(DEMO, one.overrides), one.world_size)
        assert work.world_size == one.world_size
        assert work.precision == "fp32"
    interleaved = workload_of(load_config(DEMO, parse_layout(LAYOUTS[8]).overrides), 2)
    assert (interleaved.kind, interleaved.layout.num_stages) == ("interleaved", 4)
    with pytest.raises(ConfigError, match="unknown name 'tensr'; nearest is tensor"):
        parse_layout("tensr=2")
    with pytest.raises(ConfigError, match=r"data \(0\) must be a whole number above 0"):
        parse_layout("data=0")


def test_a_layout_that_cannot_be_costs_no_run() -> None:
    """Catches minutes of runs before the mistake in the last of them."""
    with pytest.raises(ConfigError, match="num_heads"):
        check(DEMO, [], ["data=1", "tensor=3"], measured_cluster(), 3, lambda text: None)


def test_layouts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the last round alone counted, and the rounds of one layout one after another."""
    runs: list[str] = []

    def steps(folder: Path, config: str, given: list[str], case: Case, *rest: int) -> list[float]:
        runs.append(case.text)
        return [float(len(runs))] * 2

    monkeypatch.setattr(check_module, "_steps", steps)
    found = check(DEMO, [], ["data=1", "micro=2"], measured_cluster(), 3, lambda text: None, 3)
    assert runs == ["data=1", "micro=2"] * 3
    # Rounds of 1, 3, 5 and of 2, 4, 6.
    assert [one.seconds for one in found] == [3.0, 4.0]
    assert found[0].spread == pytest.approx((4.5 - 1.5) / 3.0)


def test_a_machine_that_slows_down_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a drift of the machine's speed that counts as an error of the plan: the same machine,
    whose speed is halved bit by bit between the samples."""
    speed = [1.0]
    true = {"data=1": 0.5, "micro=2": 0.7}

    class Drifting:
        def sample(self, ranks: int) -> float:
            speed[0] *= 1.05
            return speed[0]

    @contextmanager
    def pace_of(*given: object) -> Iterator[Drifting]:
        yield Drifting()

    def steps(folder: Path, config: str, given: list[str], case: Case, *rest: int) -> list[float]:
        # The run is between two samples, and its seconds are those of the speed between them.
        return [true[case.text] * speed[0] * (1 + 1.05) / 2] * 3

    monkeypatch.setattr(check_module, "_steps", steps)
    monkeypatch.setattr(check_module, "pace_of", pace_of)
    found = check(DEMO, [], list(true), measured_cluster(), 3, lambda text: None, 4)
    assert [one.seconds for one in found] == pytest.approx([0.5, 0.7])
    assert all(one.spread < 1e-9 and one.pace > 1.3 for one in found)
    row = [cell.strip() for cell in check_lines(found)[2].split("|")]
    assert row[3] == f"{found[0].pace:.2f}"
    assert row[4] == f"{0.5 * found[0].pace:.3f} s"
    assert row[7] == f"{found[0].predicted.seconds / 0.5 - 1:+.1%}"


def test_the_table_and_its_sum() -> None:
    """Catches an error of the wrong sign, an interval that does not count, and a correlation of
    values in place of ranks."""
    rows = [checked(1.2, 1.0), checked(1.0, 1.1), checked(3.0, 2.0), checked(9.0, 90.0)]
    lines = check_lines(rows)
    assert [row.split("|")[7].strip() for row in lines[2:6]] == [
        "+20.0%",
        "-9.1%",
        "+50.0%",
        "-90.0%",
    ]
    assert lines[-1].startswith("1 of 4 within 15%; mean error 42.3%; 2 inside their interval")
    # Spearman's of (2, 1, 3, 4) and (1, 2, 3, 4): 1 - 6 x 2 / (4 x 15).
    assert rank_correlation(rows) == "0.80"
    assert ranks_of([3.0, 1.0, 3.0]) == [2.5, 1.0, 2.5]
    assert rank_correlation(rows[:1]) == "-"
