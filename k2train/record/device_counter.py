"""Energy and use of a device, by NVML (`nvidia-ml-py`), where there is one.

- `nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded (NVML's API
  reference, "Device Queries"; Volta and newer).
- The driver samples the utilization several times a second and keeps some seconds of it. All
  samples since the last question count, so it does not matter in which part of a step one asks.
- A device is found by its UUID: `CUDA_VISIBLE_DEVICES` gives devices other numbers.
- What a device does not have (a MIG slice has no utilization) is left out.

Alternatives considered:
- `nvmlDeviceGetUtilizationRates` alone: the last sixth of a second, always at the end of a step.
"""

from collections.abc import Callable
from typing import Any

Counter = Callable[[], float]
"""Joules that a device has used since some time in the past."""
Readings = Callable[[], dict[str, float]]
"""What a device is doing: `utilization` (share of the time in which it was busy), `memory_bytes`
in use by all processes, `power_watts` and `celsius`."""


def energy_counter(uuid: str) -> Counter | None:
    """Return the counter of the device with this UUID; None where nothing is counted."""
    nvml, handle = _device(uuid)
    if nvml is None:
        return None
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (AttributeError, nvml.NVMLError):
        return None
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0


def device_readings(uuid: str) -> Readings | None:
    """Return the readings of the device with this UUID; None without NVML."""
    nvml, handle = _device(uuid)
    return None if nvml is None else _DeviceReadings(nvml, handle)


def _device(uuid: str) -> tuple[Any, Any]:
    """Return NVML and the handle of a device; (None, None) where there is none."""
    try:
        import pynvml as nvml
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    except (AttributeError, nvml.NVMLError):
        return None, None


class _DeviceReadings:
    """Reads a device; `nvml` is the module of that name."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._sampled = 0
        """Time of the last sample that was read, in the driver's microseconds."""

    def __call__(self) -> dict[str, float]:
        parts = {
            "utilization": self._utilization,
            "memory_bytes": lambda: float(self._ask("nvmlDeviceGetMemoryInfo").used),
            "power_watts": lambda: self._ask("nvmlDeviceGetPowerUsage") / 1000.0,
            "celsius": lambda: float(self._ask("nvmlDeviceGetTemperature", 0)),
        }
        found = {name: self._known(read) for name, read in parts.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _known(self, read: Callable[[], float | None]) -> float | None:
        try:
            return read()
        except (AttributeError, self._nvml.NVMLError):
            return None

    def _utilization(self) -> float | None:
        kind = self._nvml.NVML_GPU_UTILIZATION_SAMPLES
        _, samples = self._ask("nvmlDeviceGetSamples", kind, self._sampled)
        new = [sample for sample in samples if sample.timeStamp > self._sampled]
        if not new:
            return None
        self._sampled = max(sample.timeStamp for sample in new)
        return float(sum(sample.sampleValue.uiVal for sample in new)) / len(new) / 100.0

    def _ask(self, function: str, *given: Any) -> Any:
        return getattr(self._nvml, function)(self._handle, *given)
