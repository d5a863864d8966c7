"""What rank 0's process and device do in a step: busy processor cores, and a GPU's readings.

- `cpu_cores`: processor seconds of the process for each second of the step, on every device. On a
  GPU it shows a host that cannot keep up, on a CPU how many threads have work.
- A GPU is read at most once a second, so that short steps do not wait for the driver; the steps
  between two readings have none.
- No run ends because of it: a driver that fails is not asked again.

Alternatives considered:
- A thread that samples all the time: it takes the interpreter from the step it measures.
- W&B's own sampling: it is in neither the record nor TensorBoard.
"""

import time

import torch

from k2train.record.device_counter import Readings, device_readings

EVERY_SECONDS = 1.0


class DeviceUse:
    """Use of the process and of its device, step by step."""

    def __init__(self, device: torch.device) -> None:
        self._readings: Readings | None = None
        if device.type == "cuda":
            self._readings = device_readings(str(torch.cuda.get_device_properties(device).uuid))
        self._read_at = -EVERY_SECONDS
        self.begin()

    def begin(self) -> None:
        """Measure the process from now on: a step begins."""
        self._cpu, self._clock = time.process_time(), time.monotonic()

    def since_begin(self) -> dict[str, float]:
        """Return the use in the step that ends here."""
        clock = time.monotonic()
        spent, passed = time.process_time() - self._cpu, clock - self._clock
        found = {"cpu_cores": round(spent / passed, 3)} if passed > 0 else {}
        if self._readings is not None and clock - self._read_at >= EVERY_SECONDS:
            self._read_at = clock
            try:
                found |= self._readings()
            except Exception:
                # Whatever a driver raises: it is not asked again.
                self._readings = None
        return found
