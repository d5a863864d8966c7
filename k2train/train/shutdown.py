"""How a run ends that cannot go on: with all ranks, which know why, or alone, because another rank is gone.

What every rank knows (the disk refused, copies differ) ends like a usual run: recorded, then left together. A rank that is
gone cannot be waited for, so the others leave at once, without any further collective and without the interpreter's usual
exit, in which gloo's threads abort.
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
"""What the errors of a collective say whose other end is gone."""


NO_RANK_GONE = "lost its connection"
"""What the watch says when it finds no rank gone: then the error is all there is."""


class Run(Protocol):
    """What an end needs of a trainer."""

    step: int
    attempt: int
    logger: RunLogger
    monitor: RunMonitor

    @property
    def writer(self) -> CheckpointWriter:
        """Who saves."""


def shut_down_together(run: Run, error: SaveError | DamageError) -> int:
    """Every rank knows `error`: say it, in the ledger too if that can be written; returns the exit code."""
    damaged = isinstance(error, DamageError)
    with contextlib.suppress(OSError, SaveError):
        # The save under way is of an earlier step, and may be the one to go on from.
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
    """Whether `error` is that of a collective whose other end is gone."""
    if grid.layout.world_size == 1 or isinstance(error, UserError):
        return False
    return bool(grid.comm.broken) or any(word in str(error).lower() for word in CONNECTION_WORDS)


def shut_down_alone(run: Run, error: Exception) -> NoReturn:
    """Another rank is gone: one rank says which, rank 0 writes it down, and this process ends."""
    line = run.monitor.report_lost_connection(error)
    if NO_RANK_GONE in line:
        traceback.print_exc(file=sys.stderr)
    if line:
        sys.stderr.write(f"k2train: {line}\n")
    with contextlib.suppress(Exception):
        run.logger.event("failed", attempt=run.attempt, step=run.step, problem=line or str(error))
    sys.stderr.flush()
    os._exit(EXIT_FAILED)
