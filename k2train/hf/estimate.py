"""What an export of a config's model would write: names, files, bytes, seconds and memory.

- Needs no checkpoint. One tensor of zeros, the largest, goes through the same writer to the disk
  that was named; its rate gives the seconds.
- Memory is that of two largest tensors and of the program, which is measured.

Alternatives considered:
- A table of rates: it knows neither this disk nor this processor.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from k2train.hf.export import plan_tensors
from k2train.hf.shapes import tensor_shapes
from k2train.hf.shard_writer import Shard, plan_shards, write_shards
from k2train.model.architecture import Architecture
from k2train.processes import peak_resident_bytes

MEASURED_BYTES = 2**29
"""Bytes that are written at most."""


@dataclass(frozen=True)
class ExportEstimate:
    """An export that was planned but not made."""

    shards: tuple[Shard, ...]
    seconds: float
    bytes_per_second: float
    peak_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.num_bytes for shard in self.shards)


def estimate_export(
    a: Architecture, precision: str, shard_bytes: int, beside: Path
) -> ExportEstimate:
    """Plan an export, and measure its rate with one tensor on the disk of `beside`.

    Raises OSError.
    """
    shards = plan_shards(plan_tensors(tensor_shapes(a), precision), shard_bytes)
    every = [tensor for shard in shards for tensor in shard.tensors]
    largest = max((t for t in every if t.num_bytes <= MEASURED_BYTES), key=lambda t: t.num_bytes)

    scratch = Path(tempfile.mkdtemp(prefix=".k2train-export-", dir=beside))
    try:
        zeros = memoryview(bytearray(largest.num_bytes))
        began = time.monotonic()
        write_shards(scratch, [Shard("tensor", (largest,))], lambda tensor: zeros)
        rate = largest.num_bytes / max(time.monotonic() - began, 1e-9)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    used = peak_resident_bytes()
    sizes = sorted((tensor.num_bytes for tensor in every), reverse=True)
    total = sum(sizes)
    return ExportEstimate(tuple(shards), total / rate, rate, used + sum(sizes[1:2]))
