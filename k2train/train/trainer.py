"""Training loop: resume, step through the chunks, save a numbered checkpoint after each.

- The data position is computed from the step number, so a restart needs only the checkpoint's step.
- Every decision (skip, save, stop) is taken from sums that all ranks share in the step's one
  exchange. All ranks therefore decide alike at the same step.
- One code path for every layout, a single process included.
"""

import time
from dataclasses import replace
from pathlib import Path

from k2train import fault_injection
from k2train.checkpoint.manifest import checkpoint_name, list_checkpoints
from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.checkpoint.writer import SaveError, set_aside_later
from k2train.data.fed_ids import FLAGS
from k2train.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from k2train.parallel.agreement import Agreement
from k2train.parallel.messages import FLAG
from k2train.record.events import (
    Finished,
    Stopped,
    Straggler,
)
from k2train.train.batches import BatchSource, DamagedChunkError, UnavailableChunkError
from k2train.train.checkpointing import CheckpointManager
from k2train.train.choose import Chosen
from k2train.train.engine import Engine, StepResult
from k2train.train.evaluation import Evaluation
from k2train.train.monitor import Agreed
from k2train.train.preflight import Start
from k2train.train.shutdown import OpenRun
from k2train.train.start_point import is_unscored_end
from k2train.train.start_record import (
    log_resumed,
    log_stage_transition,
    log_started,
    log_transition,
)
from k2train.train.state import TrainState
from k2train.train.step_report import StepReport

STEP_LIMIT = "run.stop_after_steps"
"""Stop reason if the config asked for it."""
RECORD_REFUSED = "rank 0 could not write the record of the run; see its message"


class Trainer:
    """Training run of one rank: call `restore`, then `run`."""

    def __init__(
        self,
        start: Start,
        engine: Engine,
        batches: BatchSource,
        checkpoints: CheckpointManager,
        run: OpenRun,
    ):
        self.start, self.config, self.order = start, start.setup.config, start.order
        self.engine, self.batches, self.checkpoints = engine, batches, checkpoints
        self.opened, self.monitor, self.logger = run, run.monitor, run.logger
        self.report = StepReport(start, self.logger, engine.grid.device)
        self.evaluation = Evaluation(engine, batches, run)
        self.first_step = 1
        """First step of this start."""
        self.owes_score = False
        """Whether the newest checkpoint is the end of a chunk, without the score it is to have."""
        self.owes_save = False
        """Whether a save that was asked for waits for a step that is applied."""

    @property
    def state(self) -> TrainState:
        """Training state, without weights and moments."""
        return self.opened.state

    def restore(self, chosen: Chosen) -> None:
        """Load the chosen checkpoint, or begin the stage; collective."""
        if chosen.path is None:
            self._begin()
        else:
            self._resume(chosen, chosen.path)

    def run(self) -> int:
        """Train to the end of the stage or to a stop request; returns the exit code. Collective."""
        # From here on a signal stops the run after a step, with a save.
        self.monitor.stop.end_start()
        if (asked := self.evaluation.asked or self.monitor.agreed_stop()) is not None:
            return self._stop(asked, skip_verification=True)
        self.opened.starting = False
        self.checkpoints.restart_clock()
        try:
            code = self._score_loaded() if self.owes_score else None
            if self.state.step < self.order.total_steps:
                self.logger.progress(f"step {self.state.step + 1} of {self.order.total_steps}")
            while code is None and self.state.step < self.order.total_steps:
                code = self._step()
            code = self._finish() if code is None else code
        except (DamagedChunkError, UnavailableChunkError):
            # All ranks leave together, so the save of the previous chunk can still finish.
            self.checkpoints.wait(self.state.step)
            raise
        self.engine.optimizer.finish()
        return code

    def _step(self) -> int | None:
        """Train a step and do what it asks for; returns an exit code if the run ends with it."""
        state = self.state
        state.step += 1
        self.report.begins(state.step)
        result, agreed = self.train_step()

        decision = state.guard.finite.observe(result.applied)
        if decision != "apply":
            self.report.skipped(state, result)
        # All ranks see the same sums, so all of them stop here.
        if decision == "stop":
            return self._stop_not_finite()
        # A rank could not save or record; the flag reaches all ranks at the same step.
        if agreed.failed:
            self.checkpoints.wait(state.step)
            raise SaveError(self.logger.problem or RECORD_REFUSED)

        reason = agreed.stop or self._limit_reached()
        # Between bad steps only a stop saves: if they end the run, the next start goes back before
        # the first of them, and what damaged them may be gone. What was asked for is made later.
        self.owes_save |= agreed.save_asked
        wanted = agreed.save_due or self.owes_save
        required = reason is not None or (wanted and decision == "apply")
        # A chunk's numbered checkpoint also serves a request that falls on its end.
        if self.order.is_chunk_end(state.step):
            self._end_chunk(required, scored=agreed.stop is None)
            reason = reason or self.evaluation.asked
        elif required:
            consumed = self.order.consumed_chunks(state.step)
            self._save(checkpoint_name(consumed, state.step), None)

        if reason is not None and (state.step < self.order.total_steps or self.owes_score):
            return self._stop(reason, skip_verification=reason != STEP_LIMIT)
        return None

    def train_step(self) -> tuple[StepResult, Agreed]:
        """Train the step of the state's number, and report it; collective."""
        began, state = time.monotonic(), self.state
        flags = self.monitor.begin_step(
            state.step,
            saving=self.checkpoints.writer.active,
            save_due=self.checkpoints.is_due(state.step),
            failed=self.checkpoints.writer.failed or bool(self.logger.problem),
        )
        fault_injection.set_step(state.step)
        fault_injection.point("step.read")
        first = state.step == self.first_step
        batch = self.batches.step(state.step, first, self.engine.needs_batch)

        lr = self.start.setup.learning_rate(state.step, self.order.total_steps)
        shared = [*self.batches.fed_ids, *flags]
        # A request that comes while the step computes is shared with it.
        self.monitor.share_late_stop(shared, FLAGS)
        result = self.engine.train_step(batch, lr, shared)

        # The host has waited for the device by now, so this is the real time of the step.
        seconds = time.monotonic() - began
        self.checkpoints.step_done(seconds)
        agreed = self.monitor.end_step(seconds, result.flags[FLAGS:])
        fed_ids = self.batches.fed(state.step, result.flags[:FLAGS])
        if result.applied:
            state.loss = result.loss

        root = self.monitor.root()
        if root is not None:
            self.logger.root(state.step, root)
        state_root = None if root is None else root.root
        self.report.done(state.step, result, lr, seconds, fed_ids, state_root)
        if agreed.slow is not None:
            self.logger.event(
                Straggler(attempt=self.logger.attempt, step=state.step, told=agreed.slow)
            )
            self.logger.info(agreed.slow)

        fault_injection.point("step.done")
        if result.applied:
            self.report.spikes(state, result)
        return result, agreed

    def _limit_reached(self) -> str | None:
        limit = self.config.run.stop_after_steps
        reached = limit is not None and self.state.step - self.first_step + 1 >= limit
        return STEP_LIMIT if reached else None

    def _end_chunk(self, required: bool, scored: bool) -> None:
        """Save a checkpoint if one is due or `required`.

        `scored` adds the held-out loss, for which a signal leaves no time.
        """
        state, consumed = self.state, self.order.consumed_chunks(self.state.step)
        last = consumed == len(self.order.names)
        if not (last or required or consumed % self.config.checkpoint.every_chunks == 0):
            return
        try:
            held_out = self.evaluation.run(state.step) if scored else None
        except (DamagedChunkError, UnavailableChunkError):
            # Save first: otherwise every start would train this chunk again and fail here.
            self._save_end(consumed, None)
            self.checkpoints.wait(state.step)
            raise
        self._save_end(consumed, held_out)

    def _save_end(self, consumed: int, held_out: tuple[HeldOutFacts, ...] | None) -> None:
        """Save the end of a chunk under its number.

        The stage is not finished without its last score. Its end is then saved like a checkpoint
        inside the last chunk, and the next start scores it and gives it its number.
        """
        name, step = checkpoint_name(consumed), self.state.step
        unscored = held_out is None and bool(self.batches.held_out)
        self.owes_score = unscored and consumed == len(self.order.names)
        if self.owes_score:
            name = checkpoint_name(consumed - 1, step)
        if unscored:
            later = "; the next start computes it" if self.owes_score else ""
            self.logger.info(f"{name} has no held-out loss, it was not computed{later}")
        # One that is still without its score was loaded from there.
        if not self.owes_score or step >= self.first_step:
            self._save(name, held_out)

    def _save(self, name: str, held_out: tuple[HeldOutFacts, ...] | None) -> None:
        """Save a checkpoint, which also meets a request for one."""
        self.owes_save = False
        self.checkpoints.save(name, self.state, held_out)

    def _score_loaded(self) -> int | None:
        """Score the end of the chunk that was loaded, and save it under its number.

        Returns the exit code if the run is asked to stop meanwhile.
        """
        self._end_chunk(required=True, scored=True)
        asked = self.evaluation.asked
        return None if asked is None else self._stop(asked, skip_verification=True)

    # The end of a run.

    def _stop_not_finite(self) -> int:
        self.checkpoints.wait(self.state.step)
        self._stopped("non-finite")
        self.logger.info(
            f"stopped: {self.state.guard.finite.limit} steps in a row were skipped; "
            "the weights are those before them"
        )
        return EXIT_FAILED

    def _stop(self, reason: str, skip_verification: bool) -> int:
        skip = skip_verification and self.monitor.kill_may_follow
        self.checkpoints.wait(self.state.step, skip)
        self.monitor.stopped()
        self._stopped(reason)
        self.logger.info(
            f"stopped on request ({reason}) at step {self.state.step}; "
            "run the same command again to continue"
        )
        self._settle_record()
        return EXIT_STOPPED

    def _finish(self) -> int:
        self.checkpoints.wait(self.state.step)
        self.monitor.finished()
        # Before `finished` is recorded, so that it never follows missing rows, and after it.
        self._settle_record()
        self.logger.event(Finished(attempt=self.logger.attempt, step=self.state.step))
        self._settle_record()
        self.logger.info(
            f"finished at step {self.state.step}; "
            f"see python tools/show_run.py {self.start.directory}"
        )
        return EXIT_DONE

    def _settle_record(self) -> None:
        """Raise SaveError on every rank when part of the record is not on disk; collective."""
        agreement = Agreement(self.engine.grid)
        if not agreement.from_first(self.logger.all_written(), FLAG, "settle the record"):
            raise SaveError(self.logger.problem or RECORD_REFUSED)

    def _stopped(self, reason: str) -> None:
        self.logger.event(Stopped(attempt=self.logger.attempt, reason=reason, step=self.state.step))

    # The begin of a run.

    def _resume(self, chosen: Chosen, path: Path) -> None:
        chosen, path, manifest = self.checkpoints.load_newest(chosen, path)
        self.checkpoints.writer.mark_loaded(path)
        self.opened.state = TrainState.of(manifest)
        self.first_step = self.state.step + 1
        self.owes_score = is_unscored_end(manifest)

        # Later checkpoints belong to a continuation that is given up.
        logger, grid = self.logger, self.engine.grid
        set_aside = set_aside_later(path, logger.attempt) if grid.rank == 0 else []
        logger.recover(list_checkpoints(self.start.checkpoints))

        log_resumed(logger, self.start, self.engine, chosen, set_aside)

    def _begin(self) -> None:
        log_started(self.logger, self.start, self.engine)
        if self.start.parent is not None:
            self._load_stage_before(self.start.parent)

        self.monitor.stop.end_start()
        held_out = self.evaluation.run(self.state.step)
        # Asked to stop: nothing was trained, so the next start begins like this one.
        if self.evaluation.asked is None:
            # ckpt_000 is the state before the first step.
            self.logger.progress(f"saving {checkpoint_name(0)}")
            self.checkpoints.save(checkpoint_name(0), self.state, held_out)

    def _load_stage_before(self, parent: Path) -> None:
        manifest, kept = self.checkpoints.load_parent(parent)
        assert self.start.transition is not None, "a stage that starts from a parent"
        event = replace(self.start.transition, attempt=self.logger.attempt, moments_kept=kept)
        self.state.parent = {k: v for k, v in event.row().items() if k not in ("event", "attempt")}
        log_transition(self.logger, event, scored=bool(self.start.held_out))
        loaded = (
            "weights and moments"
            if kept
            else "weights alone (that checkpoint was thinned; moments start from zero)"
        )
        self.logger.info(f"{loaded} from {parent}, step {manifest.step}")
        log_stage_transition(self.logger, event)
