"""Curves of a run: a value of another key, and a mean over rows in place of tokens."""

from dataclasses import replace
from pathlib import Path

from k2train.record.events import Started
from k2train.record.held_out import HeldOutRecord
from k2train.report.collect import read_run
from k2train.report.curves import figures
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records


def test_each_figure_has_the_values_of_its_key(tmp_path: Path) -> None:
    """Catches two keys exchanged, and a unit that is not the heading's."""
    write_ledger(tmp_path, [(0.0, event(Started))])
    row = replace(
        step(1, loss=3.0, seconds=2.0), mfu=0.42, update_norm=0.125, grad_norm=0.75, lr=0.003
    )
    use = {"cpu_cores": 1.5, "utilization": 0.9, "memory_bytes": 2**31, "power_watts": 600.0}
    row = replace(row, device={**use, "celsius": "nan"})  # type: ignore[dict-item]
    write_records(tmp_path, [row], [HeldOutRecord(1, 1, "held_out", 2.5, 1, 0, 9)])
    found = {
        figure.title: [curve.points for curve in figure.curves]
        for figure in figures(read_run(tmp_path))
    }
    assert found["Loss"] == [[(1, 3.0)], [(1, 2.5)]]
    assert found["Gradient norm"] == [[(1, 0.75)]]
    assert found["Update norm"] == [[(1, 0.125)]]
    assert found["Learning rate"] == [[(1, 0.003)]]
    assert found["Throughput"] == [[(1, 50.0)]]
    assert found["Model FLOPs utilization"] == [[(1, 42.0)]]
    assert found["Seconds a step"] == [[(1, 2.0)]]
    assert found["Peak memory"] == [[(1, 1.0)]]
    assert found["Device utilization"] == [[(1, 90.0)]]
    assert found["Device memory"] == [[(1, 2.0)]]
    assert found["Device power"] == [[(1, 600.0)]]
    assert found["Busy processor cores"] == [[(1, 1.5)]]
    # Not a number in the file: left out, and no end of the report.
    assert found["Device temperature"] == [[]]


def test_a_subset_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    """Catches a mean of steps: 100 tokens of loss 1 and 300 of loss 3 are 2.5."""
    write_ledger(tmp_path, [(0.0, event(Started))])
    parts = [{"code": [100, 1.0]}, {"code": [300, 3.0], "web": [50, "nan"]}]
    rows = [replace(step(n // 2 + 1), subsets=parts[n % 2]) for n in range(2)]
    rows = [replace(row, step=n + 1) for n, row in enumerate(rows)]
    # So many steps that two share a bin.
    more = [replace(step(n), subsets={"code": [100, 2.0]}) for n in range(3, 201)]
    write_records(tmp_path, [*rows, *more])
    titles = {figure.title: figure for figure in figures(read_run(tmp_path))}
    curve = titles["Training loss by subset"].curves[0]
    assert (curve.name, curve.points[0], len(curve.points)) == ("code", (2, 2.5), 100)


def test_two_runs_have_colors_of_their_own(tmp_path: Path) -> None:
    """Catches a second run drawn in the color of the first one's held-out sets."""
    runs = []
    for name in ("a", "b"):
        write_ledger(tmp_path / name, [(0.0, event(Started))])
        sets = [HeldOutRecord(1, 1, part, 2.5, 1, 0, 9) for part in ("held_out", "exam", "more")]
        write_records(tmp_path / name, [step(1)], sets)
        runs.append(read_run(tmp_path / name))
    curves = figures(*runs)[0].curves
    assert [(curve.name, curve.run) for curve in curves][4] == ("training b", 1)
    assert [curve.color for curve in curves] == list(range(1, 9))
