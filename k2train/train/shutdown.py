"""Shutdown: how a run ends on this rank, collective or alone, whatever it has open by then.

- A failure that every rank knows (a full disk, replicas that differ) ends like a usual run: it is
  recorded, then all ranks leave together.
- A dead rank cannot be waited for. The others leave at once, without another collective and
  without the interpreter's usual exit, in which gloo's threads abort.
- A start that is asked to stop ends at once on every rank. One whose connection breaks meanwhile
  waits a moment for its own signal.
- A launcher ends what is left of a failed start by a signal, too. Such a start ends like one whose
  connection broke: the rank that failed is named and recorded.
- Where that rank has refused to go on, which it says itself, the others end with its exit code and
  say nothing. The same holds for a second Ctrl-C.
- Any other error is recorded as far as it can be, and raised.
"""

import contextlib
import os
import sys
import time
import traceback
from types import TracebackType
from typing import NoReturn, Self

from k2train.checkpoint.writer import CheckpointWriter, SaveError
from k2train.errors import (
    EXIT_FAILED,
    EXIT_USAGE,
    AnotherRefusedError,
    UnavailableError,
    UserError,
)
from k2train.guard.stop_signals import StopAsked
from k2train.launch.environment import (
    ANOTHER_FAILED,
    SIGNAL_SECONDS,
    another_has_refused,
    another_has_stopped,
    another_was_interrupted,
    was_asked_to_stop,
)
from k2train.parallel.grid import ProcessGrid
from k2train.record.events import Failed, Stopped
from k2train.train.batches import BatchSource
from k2train.train.monitor import DamageError, RunMonitor
from k2train.train.run_logger import RunLogger
from k2train.train.state import TrainState

CONNECTION_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
"""Words in the errors of a collective whose peer is gone."""

REFUSED, INTERRUPTED = "refused", "interrupted"
"""Reasons of ends: a mistake in config or data, and a second Ctrl-C."""

NO_RANK_GONE = "lost its connection"
"""The watchdog's words when it finds no dead rank: the error itself is then the only evidence."""


class OpenRun:
    """What a run has open on this rank, set as it is built; closed when its block is left.

    `code` is the exit code. It is set here for a failure that every rank knows.
    """

    def __init__(self, grid: ProcessGrid, monitor: RunMonitor):
        self.grid, self.monitor = grid, monitor
        self.logger = RunLogger()
        self.writer: CheckpointWriter | None = None
        self.batches: BatchSource | None = None
        self.state = TrainState()
        self.code = EXIT_FAILED
        self.starting = True
        """Whether nothing was trained yet, so that a stop leaves at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        problem, code, asked = "", 0, None
        try:
            asked = self._asked_to_stop(error)
            if asked is not None:
                self._stopped(str(asked))
                if asked is not error:
                    raise asked from None
                return False

            if isinstance(error, KeyboardInterrupt):
                self._stopped(INTERRUPTED)
                error.args = (self._interrupted_at(),)
                return False

            if isinstance(error, StopAsked):
                self._end_like_another()
                self._leave_alone(error)

            if isinstance(error, SaveError | DamageError):
                # Every rank knows this error, so all of them leave together.
                self.code = self._leave_together(error)
                return True

            if isinstance(error, Exception):
                if self._is_connection_lost(error):
                    # A peer is gone, so no further collective is possible.
                    self._end_like_another()
                    self._leave_alone(error)
                problem = str(error) or type(error).__name__
                if isinstance(error, UserError | UnavailableError):
                    refused = isinstance(error, UserError)
                    code = EXIT_USAGE if refused else EXIT_FAILED
                    self._stopped(REFUSED if refused else "unavailable", problem)
            return False
        finally:
            self.monitor.phase("done", self.state.step)
            # First, so that no watchdog takes this rank's exit for its death.
            if asked is not None:
                self.monitor.close(stopped=str(asked))
            elif problem:
                self.monitor.close(problem, code=code)
            self.close()

    def _asked_to_stop(self, error: BaseException | None) -> StopAsked | None:
        """Return the request that ends a start; None if `error` has another reason.

        A rank that hears its signal first breaks the connections of the others. So does one that
        failed, after which the launcher sends a signal.
        """
        if isinstance(error, StopAsked):
            return self._request(error)
        if not (self.starting and isinstance(error, Exception) and self._is_connection_lost(error)):
            return None
        stop = self.monitor.stop
        # A signal must not end the search for the cause, which takes seconds.
        stop.end_start()
        deadline = time.monotonic() + SIGNAL_SECONDS
        while stop.requested is None and time.monotonic() < deadline:
            # It tells its launcher, and in its heartbeat, before it breaks a connection.
            if other := another_has_stopped() or self.monitor.watchdog.another_stopped():
                return StopAsked(other)
            time.sleep(0.02)
        return None if stop.requested is None else self._request(StopAsked(stop.requested))

    def _request(self, asked: StopAsked) -> StopAsked | None:
        """Return the request behind a signal, this rank's or another's; None for a failure."""
        if was_asked_to_stop(str(asked)):
            return asked
        # A launcher ends what is left by SIGTERM, also where one rank alone was asked.
        other = self.monitor.watchdog.another_stopped()
        return StopAsked(other) if other else None

    def _interrupted_at(self) -> str:
        """Say where a second Ctrl-C has ended the run, and which checkpoint there is."""
        newest = None if self.writer is None else self.writer.newest
        kept = "no checkpoint is saved" if newest is None else f"the newest checkpoint is {newest}"
        return f"interrupted at step {self.state.step}: ended at once; {kept}"

    def close(self) -> None:
        """Stop the loader's threads and close the record.

        Does not wait for a running save. The watchdog keeps running.
        """
        for part in (self.batches, self.writer, self.logger):
            if part is not None:
                part.close()

    def leave(self) -> None:
        """Close and forget what was built, for a run that begins again in this process."""
        self.close()
        self.monitor.detach()
        self.writer, self.batches, self.logger = None, None, RunLogger()
        self.state = TrainState()

    def _leave_together(self, error: SaveError | DamageError) -> int:
        """Record an error that every rank knows, and return the exit code; collective.

        The error goes to the ledger too, if that can be written.
        """
        advice = error.advice if isinstance(error, DamageError) else None

        with contextlib.suppress(OSError, SaveError):
            # The running save is of an earlier step, and may be the one to resume from.
            if self.writer is not None:
                self.writer.wait()

        with contextlib.suppress(OSError):
            reason = "save failed" if advice is None else "damaged"
            self._stopped(reason, str(error))

        where = f"stopped at step {self.state.step}"
        self.logger.info(str(error) if advice is None else f"{where}: {error}{advice}")
        return EXIT_FAILED

    def _is_connection_lost(self, error: Exception) -> bool:
        """Return whether `error` was raised by a collective whose peer is gone."""
        if self.grid.layout.world_size == 1 or isinstance(error, UserError | UnavailableError):
            return False
        text = str(error).lower()
        return bool(self.grid.comm.broken) or any(word in text for word in CONNECTION_WORDS)

    def _leave_alone(self, error: Exception | StopAsked) -> NoReturn:
        """End this process after another rank died, or a launcher ended the start for that reason.

        One rank prints which rank died; rank 0 records it in the ledger.
        """
        ended = isinstance(error, StopAsked)
        if ended:
            error = UnavailableError(f"{error} during a start; {ANOTHER_FAILED}")
        line = self.monitor.report_lost_connection(error)
        if NO_RANK_GONE in line and not ended:
            traceback.print_exc(file=sys.stderr)
        if ended and self.grid.rank > 0 and self.monitor.watchdog.limits.heartbeat_seconds <= 0:
            # Without a watchdog no rank knows who reports, so rank 0 says it.
            line = ""

        if line:
            sys.stderr.write(f"k2train: {line}\n")

        with contextlib.suppress(Exception):
            self.logger.event(
                Failed(
                    attempt=self.logger.attempt,
                    step=self.state.step,
                    # What another rank has reported says more than a connection that broke.
                    problem=line or self.monitor.reported() or str(error),
                )
            )

        sys.stderr.flush()
        os._exit(EXIT_FAILED)

    def _end_like_another(self) -> None:
        """Record and raise what ended another rank, if that is no failure: it is told already.

        Raises AnotherRefusedError after a mistake in config or data, KeyboardInterrupt after a
        second Ctrl-C.
        """
        problem = self.monitor.watchdog.refusal()
        if problem or another_has_refused():
            self._stopped(REFUSED, problem or None)
            raise AnotherRefusedError(problem) from None
        if another_was_interrupted():
            self._stopped(INTERRUPTED)
            raise KeyboardInterrupt(self._interrupted_at()) from None

    def _stopped(self, reason: str, problem: str | None = None) -> None:
        self.logger.event(
            Stopped(
                attempt=self.logger.attempt,
                reason=reason,
                step=self.state.step,
                problem=problem,
            )
        )
