"""Step, phase and collective of a rank, readable by the ranks of its machine at every moment, also after a kill -9.

A few integers in memory that has no name: a rank opens it through /proc/PID/fd of the other while that lives, and what was
mapped stays when the writer dies. A write is one store, so it may stand in the training loop. Refused: mapping the
heartbeat file (a full disk then ends the process with SIGBUS) and named shared memory (it stays behind after a kill).
"""

import contextlib
import mmap
import os
from dataclasses import replace

from k2train.watchdog.heartbeat import Heartbeat, Process, process_state
from k2train.watchdog.timeouts import CLOCKS

COUNT, STEP, PHASE = 0, 1, 2
"""Places of the integers; the first is written by `parallel.comm`."""
CELLS = 8
SIZE = CELLS * 8
PHASES = tuple(CLOCKS)


class SharedProgress:
    """The integers of this rank; `descriptor` is what others open."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("k2train-live", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, SIZE)
        self.cells: list[int] | memoryview[int] = memoryview(mmap.mmap(self.descriptor, SIZE)).cast(
            "q"
        )

    def update(self, phase: str, step: int) -> None:
        """Say where the rank is."""
        self.cells[STEP] = step
        self.cells[PHASE] = PHASES.index(phase)

    def close(self) -> None:
        """Nobody can open it any more; the integers stay writable."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


class PeerProgress:
    """The integers of other ranks of this machine, held from the first time each is looked for."""

    def __init__(self, reader: Process):
        self._reader = reader
        self._maps: dict[Process, mmap.mmap] = {}

    def attach(self, record: Heartbeat) -> None:
        """Map those of the rank of `record`, if it runs here and has not been mapped."""
        process = record.process
        if (
            process in self._maps
            or record.live < 0
            or process_state(process, self._reader) not in ("running", "stopped")
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
        """The record with step, phase and number of collectives as they are now, where they are held."""
        mapping = self._maps.get(record.process)
        if mapping is None:
            return record
        with memoryview(mapping) as whole, whole.cast("q") as cells:
            count, step, phase = cells[COUNT], cells[STEP], cells[PHASE]
        # The name is of the number that was written with it.
        same = count == record.count
        return replace(
            record,
            count=count,
            step=step,
            phase=PHASES[phase],
            current=record.current if same else "",
            last=record.last if same else "",
        )
