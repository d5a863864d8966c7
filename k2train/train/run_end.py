"""End of a run that can still speak with all ranks: finished, stopped on request, given up.

- Each end waits for the running save, writes its event, and returns the exit code.
- A run that cannot go on together ends in `k2train.train.shutdown`.

Alternatives considered:
- Methods of the trainer: the loop and its ends share nothing but the state.
"""

from k2train.checkpoint.writer import SaveError
from k2train.commands import program_text
from k2train.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from k2train.parallel.agreement import Agreement
from k2train.parallel.messages import FLAG
from k2train.record.events import Finished, Stopped
from k2train.train.checkpointing import CheckpointManager
from k2train.train.preflight import Start
from k2train.train.shutdown import OpenRun
from k2train.train.spike_history import STOPPED_BY_SPIKE

RECORD_REFUSED = "rank 0 could not write the record of the run; see its message"


class RunEnd:
    """Ends of one rank's run, all of them collective; each returns the exit code."""

    def __init__(self, start: Start, run: OpenRun, checkpoints: CheckpointManager):
        self.start, self.checkpoints = start, checkpoints
        self.opened, self.monitor, self.logger = run, run.monitor, run.logger

    def not_finite(self) -> int:
        """End a run whose steps are skipped in a row, since they are not finite."""
        finite = self.opened.state.guard.finite
        self._wait()
        self.stopped("non-finite")
        self.logger.info(
            f"stopped: {finite.limit} steps in a row were skipped; "
            "the weights are those before them"
        )
        return EXIT_FAILED

    def spike(self, problem: str, decide: str) -> int:
        """End a run because of a spike; it goes on only when somebody has decided how."""
        step = self.opened.state.step
        self._wait()
        self.stopped(STOPPED_BY_SPIKE, problem)
        self._settle_record()
        self.logger.info(f"stopped at step {step}: {problem}; {decide}")
        return EXIT_FAILED

    def stop(self, reason: str, skip_verification: bool) -> int:
        """End a run that was asked to stop, and has saved."""
        step, skip = self.opened.state.step, skip_verification and self.monitor.kill_may_follow
        self._wait(skip)
        self.monitor.stopped()
        self.stopped(reason)
        self.logger.info(
            f"stopped on request ({reason}) at step {step}; run the same command again to continue"
        )
        self._settle_record()
        return EXIT_STOPPED

    def finish(self) -> int:
        """End a run whose last step is done and saved."""
        step = self.opened.state.step
        self._wait()
        self.monitor.finished()
        # Before `finished` is recorded, so that it never follows missing rows, and after it.
        self._settle_record()
        self.logger.event(Finished(attempt=self.logger.attempt, step=step))
        self._settle_record()
        self.logger.info(
            f"finished at step {step}; see {program_text('show_run')} {self.start.directory}"
        )
        return EXIT_DONE

    def stopped(self, reason: str, problem: str | None = None) -> None:
        """Record why the run ends before its last step."""
        step, attempt = self.opened.state.step, self.logger.attempt
        self.logger.event(Stopped(attempt=attempt, reason=reason, step=step, problem=problem))

    def _wait(self, skip_verification: bool = False) -> None:
        """Wait for the running save, and record what is known of the steps after a checkpoint.

        Before the event that ends the run, which is the last one of its start.
        """
        self.checkpoints.wait(self.opened.state.step, skip_verification)
        self.checkpoints.on_end()

    def _settle_record(self) -> None:
        """Raise SaveError on every rank when part of the record is not on disk; collective."""
        agreement = Agreement(self.opened.grid)
        if not agreement.from_first(self.logger.all_written(), FLAG, "settle the record"):
            raise SaveError(self.logger.problem or RECORD_REFUSED)
