"""Use of rank 0's device: a driver asked in every step, and one that fails and ends the run."""

import time
from types import SimpleNamespace

import pytest
import torch

from k2train.train import device_use
from k2train.train.device_use import DeviceUse


def test_busy_cores_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a share of what lay between two steps, such as a save, counted to the next one."""
    use = DeviceUse(torch.device("cpu"))
    times = {"process_time": 10.0, "monotonic": 100.0}
    for name in times:
        monkeypatch.setattr(time, name, lambda name=name: times[name])
    use.begin()
    times |= {"process_time": 13.0, "monotonic": 102.0}
    assert use.since_begin() == {"cpu_cores": 1.5}
    times |= {"process_time": 50.0, "monotonic": 110.0}
    use.begin()
    times |= {"process_time": 50.5, "monotonic": 111.0}
    assert use.since_begin() == {"cpu_cores": 0.5}


def test_a_driver_is_asked_once_a_second_and_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a step of milliseconds that waits for the driver, and a run that ends with it."""
    asked: list[str] = []

    def readings() -> dict[str, float]:
        if len(asked) > 2:
            raise RuntimeError("driver is gone")
        return {"utilization": 0.5}

    def found(uuid: str) -> object:
        return lambda: asked.append(uuid) or readings()

    monkeypatch.setattr(device_use, "device_readings", found)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-cd")
    )
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    use = DeviceUse(torch.device("cuda", 1))
    seen = []
    for tenth in range(1, 60):
        use.begin()
        now = tenth / 10
        seen.append(use.since_begin().get("utilization"))
    assert [n for n, value in enumerate(seen, 1) if value is not None] == [1, 11]
    # Not asked again after it failed.
    assert asked == ["ab-cd"] * 3
