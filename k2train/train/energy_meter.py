"""Energy that this rank's device used, by phase of the run, from NVML's counter.

- The counter is read where the phase changes, not in every step.
- `energy/rank_00003.jsonl` in the run directory has the sums of an attempt so far, a line after
  every save, evaluation and minute. A kill costs the joules since the last one.
- A run that goes back begins its next attempt in the same process: the sums begin anew.
- Without a counter (a CPU, an older GPU, no `nvidia-ml-py`) there is no file.
- No run ends because of its energy: a counter or a disk that fails is not asked again.

Alternatives considered:
- Sampling the power in a thread: it misses what happens between two samples.
- Adding the joules to the step's exchange: a number for all ranks, of which a host makes no use.
"""

import time
from pathlib import Path

import torch

from k2train.record.device_counter import Counter, energy_counter
from k2train.record.jsonl import append_bytes, encode_line
from k2train.record.line_check import with_check

KINDS = {
    "read": "step",
    "evaluate": "evaluate",
    "save": "save",
    "done": "other",
}
"""Phase -> what its joules are booked on; any other phase is a start's."""
START = "start"
EVERY_SECONDS = 60.0


def counter_of(device: torch.device) -> Counter | None:
    """Return the energy counter of a device; None where it has none."""
    if device.type != "cuda":
        return None
    return energy_counter(str(torch.cuda.get_device_properties(device).uuid))


class EnergyMeter:
    """Joules of one rank's device by phase, kept in a file of `directory`."""

    def __init__(self, counter: Counter | None, directory: Path, rank: int) -> None:
        self._attempt = 0
        self.path = directory / f"rank_{rank:05d}.jsonl"
        self._counter = counter
        self._kind, self._joules = START, dict[str, float]()
        self._step = 0
        self._written = time.monotonic()
        self._before = self._read()

    def begin(self, attempt: int) -> None:
        """Count for this attempt, 0 until its number is known: nothing is written before.

        What the attempt before it in this process used stays with that one.
        """
        if self._counter is not None and self._attempt not in (0, attempt):
            self._enter(START)
            self._write()
            self._joules = {}
        self._attempt = attempt

    def phase(self, name: str, step: int) -> None:
        """Book what was used so far on the phase that ends here."""
        if self._counter is None:
            return
        kind = KINDS.get(name, START)
        due = time.monotonic() - self._written >= EVERY_SECONDS
        if kind == self._kind and not due:
            self._step = step
            return

        ended = self._enter(kind)
        self._step = step
        if due or ended in ("save", "evaluate") or name == "done":
            self._write()

    def _enter(self, kind: str) -> str:
        """Book what was used on the kind that ends here; returns it."""
        used = self._read()
        self._joules[self._kind] = self._joules.get(self._kind, 0.0) + used - self._before
        ended, self._kind, self._before = self._kind, kind, used
        return ended

    def _read(self) -> float:
        if self._counter is None:
            return 0.0
        try:
            return self._counter()
        except Exception:
            # Whatever a driver raises: the last value stays, and it is not asked again.
            self._counter = None
            return getattr(self, "_before", 0.0)

    def _write(self) -> None:
        if not self._attempt:
            return
        self._written = time.monotonic()
        row = {"step": self._step, "attempt": self._attempt, "joules": dict(self._joules)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_bytes(self.path, with_check(encode_line(row)), sync=False)
        except OSError:
            self._counter = None
