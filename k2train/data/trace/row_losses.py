"""Losses of the sequences of every step, in a compact file for each attempt of a run.

    RUN/row_losses/attempt_001.bin      records of one length, one a step

- A record is the step (uint64), XXH3-64 of what follows it (uint64), and the summed loss of each
  row of the global batch in nats (float32). 8 KiB a step for 2,040 rows.
- Written with `audit.row_losses: true` by rank 0, one write a step, never overwritten. A record
  that is torn or damaged is passed over: it is a fact less, and no part of a run depends on it.

Alternatives considered:
- In the metrics: their rows would be a hundred times as long, and read by every tool.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from k2train.retry import stat_retried

FOLDER = "row_losses"


def losses_path(directory: Path, attempt: int) -> Path:
    """Path of the losses of an attempt."""
    return directory / FOLDER / f"attempt_{attempt:03d}.bin"


def record_of(step: int, losses: Sequence[float]) -> bytes:
    """Encode the record of a step."""
    values = np.asarray(losses, dtype="<f4").tobytes()
    digest = xxhash.xxh3_64_intdigest(values, step)
    return step.to_bytes(8, "little") + digest.to_bytes(8, "little") + values


def append_losses(directory: Path, attempt: int, step: int, losses: Sequence[float]) -> None:
    """Append the losses of a step: the summed loss of each row. Raises OSError."""
    path = losses_path(directory, attempt)
    path.parent.mkdir(exist_ok=True)
    content = record_of(step, losses)
    with path.open("ab") as stream:
        # A record that a kill or a full disk has torn is filled up, so that the next one is found.
        torn = stream.tell() % len(content)
        stream.write(b"\0" * (len(content) - torn if torn else 0) + content)


class RowLosses:
    """The recorded losses of a run with `rows` rows in each step."""

    def __init__(self, directory: Path, rows: int) -> None:
        self.directory = directory
        self._form = np.dtype([("step", "<u8"), ("check", "<u8"), ("losses", "<f4", (rows,))])
        self._known: dict[int, Any] = {}
        """Records and their steps, by attempt."""

    def of(self, attempt: int, step: int, index: int, last: bool = True) -> float | None:
        """Summed loss of the row `index` of a step's batch; None where it is not recorded.

        An attempt that goes back has a step twice: `last` says which one is meant.
        """
        records, steps = self._records(attempt)
        found = np.flatnonzero(steps == step)
        if not len(found):
            return None
        record = records[found[-1 if last else 0]]
        losses = np.ascontiguousarray(record["losses"])
        if xxhash.xxh3_64_intdigest(losses.tobytes(), step) != int(record["check"]):
            return None
        return float(losses[index])

    def _records(self, attempt: int) -> tuple[Any, Any]:
        if attempt not in self._known:
            path = losses_path(self.directory, attempt)
            facts = stat_retried(path)
            count = 0 if facts is None else facts.st_size // self._form.itemsize
            records = (
                np.memmap(path, self._form, mode="r", shape=(count,))
                if count
                else np.zeros(0, self._form)
            )
            self._known[attempt] = records, np.array(records["step"])
        return self._known[attempt]
