"""Fatal shutdown: collective when every rank knows the reason, local when a peer has died.

- A failure that every rank knows (a full disk, replicas that differ) ends like a usual run: it is
  recorded, then all ranks leave together.
- A dead rank cannot be waited for. The others leave at once, without another collective and
  without the interpreter's usual exit, in which gloo's threads abort.
"""

import contextlib
import os
import sys
import traceback
from typing import NoReturn, Protocol

from k2train.checkpoint.writer import CheckpointWriter, SaveError
from k2train.errors import EXIT_FAILED, UserError
from k2train.parallel.grid import ProcessGrid
from k2train.train.monitor import DamageError, RunMonitor
from k2train.train.run_logger import RunLogger

CONNECTION_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
"""Words in the errors of a collective whose peer is gone."""

NO_RANK_GONE = "lost its connection"
"""The watchdog's words when it finds no dead rank: the error itself is then the only evidence."""


class Run(Protocol):
    """The parts of a trainer that a shutdown needs."""

    step: int
    attempt: int
    logger: RunLogger
    monitor: RunMonitor

    @property
    def writer(self) -> CheckpointWriter:
        """Writer of the run's checkpoints."""


def shut_down_together(run: Run, error: SaveError | DamageError) -> int:
    """Record an error that every rank knows, and return the exit code; collective.

    The error goes to the ledger too, if that can be written.
    """
    damaged = isinstance(error, DamageError)

    with contextlib.suppress(OSError, SaveError):
        # The running save is of an earlier step, and may be the one to resume from.
        run.writer.wait()

    with contextlib.suppress(OSError):
        reason = "damaged" if damaged else "save failed"
        run.logger.event(
            "stopped", attempt=run.attempt, reason=reason, step=run.step, problem=str(error)
        )

    after = "; the last checkpoint was saved before that, start again from it" if damaged else ""
    run.logger.info(f"stopped at step {run.step}: {error}{after}" if damaged else str(error))
    return EXIT_FAILED


def is_connection_lost(error: Exception, grid: ProcessGrid) -> bool:
    """Return whether `error` was raised by a collective whose peer is gone."""
    if grid.layout.world_size == 1 or isinstance(error, UserError):
        return False
    return bool(grid.comm.broken) or any(word in str(error).lower() for word in CONNECTION_WORDS)


def shut_down_alone(run: Run, error: Exception) -> NoReturn:
    """End this process after another rank died.

    One rank prints which rank died; rank 0 records it in the ledger.
    """
    line = run.monitor.report_lost_connection(error)
    if NO_RANK_GONE in line:
        traceback.print_exc(file=sys.stderr)

    if line:
        sys.stderr.write(f"k2train: {line}\n")

    with contextlib.suppress(Exception):
        run.logger.event("failed", attempt=run.attempt, step=run.step, problem=line or str(error))

    sys.stderr.flush()
    os._exit(EXIT_FAILED)
