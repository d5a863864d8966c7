"""The counter of a device: joules booked on the wrong phase, a counter that ends a run."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from k2train.train import energy_meter
from k2train.train.energy_meter import EnergyMeter, counter_of


class Device:
    """A device whose counter the test moves."""

    def __init__(self) -> None:
        self.joules, self.broken, self.reads = 1000.0, False, 0

    def __call__(self) -> float:
        self.reads += 1
        if self.broken:
            raise RuntimeError("driver is gone")
        return self.joules


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_joules_are_booked_on_the_phase_in_which_they_were_used(tmp_path: Path) -> None:
    """Catches joules of a save booked on the steps behind it, and a read in every step."""
    device = Device()
    meter = EnergyMeter(device, tmp_path / "energy", 3)
    meter.begin(2)
    device.joules += 10  # the start
    for step in (1, 2, 3):
        meter.phase("read", step)
        device.joules += 100
    meter.phase("evaluate", 3)
    device.joules += 7
    meter.phase("save", 3)
    device.joules += 5
    reads = device.reads
    meter.phase("read", 4)
    meter.phase("read", 5)
    assert device.reads == reads + 1
    device.joules += 100
    meter.phase("done", 5)

    written = lines(tmp_path / "energy" / "rank_00003.jsonl")
    assert written[-1]["joules"] == {"start": 10.0, "step": 400.0, "evaluate": 7.0, "save": 5.0}
    assert [(line["attempt"], line["step"]) for line in written] == [(2, 3), (2, 4), (2, 5)]


def test_a_return_begins_another_sum(tmp_path: Path) -> None:
    """Catches the joules of an attempt counted again in the one that follows in its process."""
    device = Device()
    meter = EnergyMeter(device, tmp_path, 0)
    meter.begin(0)
    device.joules += 10
    meter.begin(1)
    meter.phase("read", 1)
    device.joules += 100
    # The run goes back: another start, whose number is not known at once.
    meter.begin(0)
    meter.phase("choose", 0)
    device.joules += 5
    meter.begin(2)
    meter.phase("read", 1)
    device.joules += 30
    meter.phase("done", 1)

    last = {line["attempt"]: line["joules"] for line in lines(tmp_path / "rank_00000.jsonl")}
    assert last == {1: {"start": 10.0, "step": 100.0}, 2: {"start": 5.0, "step": 30.0}}


def test_a_line_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a chunk of a day whose joules a kill takes with it."""
    now = [0.0]
    monkeypatch.setattr(energy_meter, "time", SimpleNamespace(monotonic=lambda: now[0]))
    device = Device()
    meter = EnergyMeter(device, tmp_path, 0)
    meter.begin(1)
    for step in range(1, 100):
        now[0] += 2.0
        meter.phase("read", step)
        device.joules += 1
    written = lines(tmp_path / "rank_00000.jsonl")
    assert len(written) == 3 and written[-1]["joules"] == {"start": 0.0, "step": 89.0}


def test_neither_a_driver_nor_a_disk_ends_a_run(tmp_path: Path) -> None:
    """Catches a run that dies of its energy."""
    device = Device()
    meter = EnergyMeter(device, tmp_path, 0)
    meter.begin(1)
    device.broken = True
    meter.phase("read", 1)
    meter.phase("save", 1)
    meter.phase("read", 2)
    (tmp_path / "file").touch()
    other = EnergyMeter(Device(), tmp_path / "file", 0)
    other.begin(1)
    other.phase("save", 1)
    other.phase("read", 2)
    other.phase("done", 2)


def test_without_a_counter_there_is_no_file(tmp_path: Path) -> None:
    """Catches an empty folder in every run on a CPU."""
    meter = EnergyMeter(counter_of(torch.device("cpu")), tmp_path / "energy", 0)
    meter.begin(1)
    meter.phase("save", 1)
    meter.phase("done", 1)
    assert not (tmp_path / "energy").exists()


def test_the_device_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the counter of another device where some are hidden, and millijoules for joules."""
    nvml = ModuleType("pynvml")
    asked: list[bytes] = []
    vars(nvml).update(
        NVMLError=type("NVMLError", (Exception,), {}),
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 2500 if handle == "handle" else 0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd")
    )
    counter = counter_of(torch.device("cuda", 1))
    assert counter is not None and counter() == 2.5 and asked == [b"GPU-ab-cd"]

    def refuse(handle: object) -> int:
        raise nvml.NVMLError("not supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse  # type: ignore[attr-defined]
    assert counter_of(torch.device("cuda", 1)) is None
