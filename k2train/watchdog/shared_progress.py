"""Shared-memory progress: step, phase and collective of a rank, readable even after kill -9.

- A few integers in anonymous memory. A rank opens it through /proc/PID/fd of a live peer on the
  same machine, and the mapping remains when the writer dies.
- A write is one store, cheap enough for the training loop.

Alternatives considered:
- Mapping the heartbeat file: a full disk then kills the process with SIGBUS.
- Named shared memory: it remains after a kill.
"""

import contextlib
import mmap
import os
from dataclasses import replace

from k2train.processes import Process, process_state
from k2train.watchdog.heartbeat import Heartbeat
from k2train.watchdog.timeouts import CLOCKS

COUNT, STEP, PHASE = 0, 1, 2
"""Indices of the integers. `parallel.comm_tracker` writes the first."""
CELLS = 8
SIZE = CELLS * 8
PHASES = tuple(CLOCKS)


class SharedProgress:
    """Progress integers of this rank; peers open `descriptor`."""

    def __init__(self) -> None:
        # Memory without a name: it disappears with its last user.
        self.descriptor = os.memfd_create("k2train-live", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, SIZE)
        self.cells: list[int] | memoryview[int] = memoryview(mmap.mmap(self.descriptor, SIZE)).cast(
            "q"
        )

    def update(self, phase: str, step: int) -> None:
        """Publish the current phase and step."""
        self.cells[STEP] = step
        self.cells[PHASE] = PHASES.index(phase)

    def close(self) -> None:
        """Stop sharing. The integers stay writable."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


class PeerProgress:
    """Progress integers of other ranks on this machine, mapped when each is first seen."""

    def __init__(self, reader: Process):
        self._reader = reader
        self._maps: dict[Process, mmap.mmap] = {}

    def attach(self, record: Heartbeat) -> None:
        """Map the integers of a rank that runs on this machine, once."""
        process = record.process
        # Only a live process has the descriptor under /proc.
        if (
            process in self._maps
            or record.live < 0
            or process_state(process, self._reader) not in ("running", "stopped", "traced")
        ):
            return

        with contextlib.suppress(OSError, ValueError):
            descriptor = os.open(
                f"/proc/{process.pid}/fd/{record.live}", os.O_RDONLY | os.O_CLOEXEC
            )
            try:
                self._maps[process] = mmap.mmap(descriptor, SIZE, access=mmap.ACCESS_READ)
            finally:
                os.close(descriptor)

    def refresh(self, record: Heartbeat) -> Heartbeat:
        """Update step, phase and collective count of a heartbeat from its mapped integers."""
        mapping = self._maps.get(record.process)
        if mapping is None:
            return record

        with memoryview(mapping) as whole, whole.cast("q") as cells:
            count, step, phase = cells[COUNT], cells[STEP], cells[PHASE]

        # The collective's name belongs to the count that was written with it.
        same = count == record.count
        return replace(
            record,
            count=count,
            step=step,
            phase=PHASES[phase],
            current=record.current if same else "",
            last=record.last if same else "",
        )
