"""Energy of a run: a rank left out, joules of two starts in one, a kind that is lost."""

from pathlib import Path

import pytest

from k2train.errors import RunError
from k2train.record.energy import Site
from k2train.record.events import Finished, Resumed, Started, Starting
from k2train.record.jsonl import encode_line
from k2train.record.line_check import with_check
from k2train.report.collect import RunView, read_run
from k2train.report.energy import energy_of, summed
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records


@pytest.fixture
def run(tmp_path: Path) -> RunView:
    """Two starts on 2 devices: 4 steps of which 1 is lost, then 3."""
    write_ledger(
        tmp_path,
        [
            (0.0, event(Starting, attempt=1)),
            (2.0, event(Started, attempt=1, world_size=2)),
            (20.0, event(Starting, attempt=2)),
            (21.0, event(Resumed, attempt=2, step=3, world_size=2)),
            (30.0, event(Finished, attempt=2, step=6)),
        ],
    )
    rows = [step(n) for n in range(1, 5)] + [step(n, attempt=2) for n in range(4, 7)]
    write_records(tmp_path, rows)
    return read_run(tmp_path)


def write_counter(run: RunView, rank: int, attempt: int, joules: dict[str, float]) -> Path:
    path = run.directory / "energy" / f"rank_{rank:05d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    row = {"step": 1, "attempt": attempt, "joules": joules}
    with path.open("ab") as file:
        file.write(with_check(encode_line(row)))
    return path


def test_an_assumed_power_counts_every_device_and_second(run: RunView) -> None:
    """Catches the energy of one device, and of the time when nothing ran."""
    one, two = energy_of(run, Site(100.0))
    assert (one.how, one.devices) == ("assumed", 2)
    assert (one.joules.useful, one.joules.redone, one.joules.starting) == (600.0, 200.0, 400.0)
    # The ledger of the second start says 10 seconds: 1 of the start, 3 of steps, 6 of the rest.
    assert (two.total, two.joules.other, two.joules.down) == (2000.0, 1200.0, 0.0)
    assert summed([one, two]).total == one.total + two.total
    assert energy_of(run, Site()) == []


def test_counted_joules_are_those_of_the_last_line_of_every_rank(run: RunView) -> None:
    """Catches the lines of an attempt added up: each has the sum so far."""
    for rank in (0, 1):
        write_counter(run, rank, 1, {"step": 10.0})
        write_counter(run, rank, 1, {"start": 6.0, "step": 40.0, "save": 3.0, "evaluate": 2.0})
    (one,) = energy_of(run, Site())
    assert (one.attempt, one.how) == (1, "measured")
    # 80 joules of 4 steps, one of which was done again.
    assert (one.joules.useful, one.joules.redone) == (60.0, 20.0)
    assert (one.joules.saving, one.joules.evaluating, one.joules.starting) == (6.0, 4.0, 12.0)
    assert one.total == 102.0


def test_a_part_of_the_devices_is_not_taken_for_all(run: RunView) -> None:
    """Catches the energy of one of two devices told as that of the run."""
    write_counter(run, 0, 2, {"step": 1.0})
    assert energy_of(run, Site()) == []
    assert [one.how for one in energy_of(run, Site(100.0))] == ["assumed", "assumed"]


def test_a_damaged_counter_is_told(run: RunView) -> None:
    """Catches energy that was changed by hand."""
    path = write_counter(run, 0, 1, {"step": 40.0})
    path.write_bytes(path.read_bytes().replace(b"40.0", b"10.0"))
    with pytest.raises(RunError, match=r"rank_00000\.jsonl"):
        energy_of(run, Site())
