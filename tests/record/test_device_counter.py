"""Readings of a device against a made-up driver: another unit, an old sample, a missing value.

The names and signatures are those of NVML's API reference and of `nvidia-ml-py`.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from k2train.record.device_counter import device_readings


def sample(time: int, value: int) -> Any:
    return SimpleNamespace(timeStamp=time, sampleValue=SimpleNamespace(uiVal=value))


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A driver with one device, whose samples are in `nvml.samples`."""
    module = ModuleType("pynvml")
    vars(module).update(
        samples=[sample(10, 50), sample(20, 100)],
        NVMLError=type("NVMLError", (Exception,), {}),
        NVML_GPU_UTILIZATION_SAMPLES=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetSamples=lambda handle, kind, since: (1, module.samples),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 * 2**30),
        nvmlDeviceGetPowerUsage=lambda handle: 612_500,
        nvmlDeviceGetTemperature=lambda handle, sensor: 61,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_a_device_is_read_in_units(nvml: ModuleType) -> None:
    """Catches milliwatts for watts, per cent for a share, and a sample that counts twice."""
    read = device_readings("ab-cd")
    assert read is not None
    fixed = {"memory_bytes": 3.0 * 2**30, "power_watts": 612.5, "celsius": 61.0}
    assert read() == {"utilization": 0.75, **fixed}
    # The driver keeps samples that were read before.
    vars(nvml)["samples"] = [sample(20, 100), sample(30, 20)]
    assert read() == {"utilization": 0.2, **fixed}
    assert read() == fixed


def test_what_a_device_lacks_is_left_out(nvml: ModuleType) -> None:
    """Catches all readings lost with one: a MIG slice has no utilization."""

    def refuse(*given: object) -> None:
        raise vars(nvml)["NVMLError"]("not supported")

    vars(nvml).update(nvmlDeviceGetSamples=refuse, nvmlDeviceGetTemperature=refuse)
    del vars(nvml)["nvmlDeviceGetPowerUsage"]
    read = device_readings("ab-cd")
    assert read is not None and read() == {"memory_bytes": 3.0 * 2**30}


def test_without_a_driver_nothing_is_read(
    nvml: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error of the driver, or its package that is not there, as the end of a run."""

    def refuse(*given: object) -> None:
        raise vars(nvml)["NVMLError"]("driver not loaded")

    vars(nvml)["nvmlInit"] = refuse
    assert device_readings("ab-cd") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert device_readings("ab-cd") is None
