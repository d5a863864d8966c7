"""The command of energy: options that do not reach the numbers, a run without a known power."""

from pathlib import Path

import pytest
from energy import main

from k2train.record.events import Finished, Started
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    write_ledger(
        folder,
        [
            (0.0, event(Started, attempt=1, world_size=3)),
            (7200.0, event(Finished, attempt=1, step=2)),
        ],
    )
    write_records(folder, [step(1, seconds=1800.0), step(2, seconds=1800.0)])
    return folder


def test_it_says_how_the_energy_is_known(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an option that is read and not used: 3 devices, 2 hours, 500 W, PUE 2 are 6 kWh."""
    given = ["--device-watts", "500", "--pue", "2", "--tonnes-per-mwh", "0.5"]
    assert main([str(run), *given]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mine: 6.0 kWh, 3.00 kg CO2; PUE 2, 0.5 t a MWh\nuseful 50.0%")
    assert "assumed" in out and "2h00m" in out


def test_an_unknown_power_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches 0 kWh for a run of which nothing is known."""
    assert main([str(run)]) == 2
    said = capsys.readouterr().err
    assert "give --device-watts" in said and len(said.splitlines()) == 1
    assert main(["--devices", "8", "--days", "1"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--devices", "8"],
        ["--devices", "8", "--days", "0"],
        ["RUN", "--pue", "0.5"],
        ["--pue", "x"],
    ],
)
def test_mistakes_of_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, and a plan of no days."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and "_amount" not in said
