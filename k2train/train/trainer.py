"""Training loop: resume, step through the chunks, save a numbered checkpoint after each.

- The data position is computed from the step number, so a restart needs only the checkpoint's step.
- Every decision (skip, save, stop) is taken from sums that all ranks share in the step's one
  exchange. All ranks therefore decide alike at the same step.
- One code path for every layout, a single process included.
"""

import time

from k2train import fault_injection
from k2train.checkpoint.manifest import checkpoint_name
from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.checkpoint.writer import SaveError
from k2train.data.fed_ids import FLAGS
from k2train.errors import EXIT_STOPPED
from k2train.record.events import Straggler
from k2train.train.batches import BatchSource, DamagedChunkError, UnavailableChunkError
from k2train.train.checkpointing import CheckpointManager
from k2train.train.choose import Chosen
from k2train.train.device_use import DeviceUse
from k2train.train.drill import ResumeDrill
from k2train.train.engine import Engine
from k2train.train.evaluation import Evaluation
from k2train.train.monitor import DamageError
from k2train.train.preflight import Start
from k2train.train.recheck import UnrepeatableError
from k2train.train.row_exposure import RowExposure
from k2train.train.run_begin import begin, resume
from k2train.train.run_end import RECORD_REFUSED, RunEnd
from k2train.train.run_profile import RunProfile
from k2train.train.shutdown import OpenRun
from k2train.train.spike_bundle import SpikeBundles
from k2train.train.spike_reaction import SpikeReaction
from k2train.train.state import TrainState
from k2train.train.step_flags import Agreed
from k2train.train.step_report import Done, StepReport
from k2train.train.step_result import StepResult

STEP_LIMIT = "run.stop_after_steps"
"""Stop reason if the config asked for it."""


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
        self.exposure = RowExposure(start, engine, run.logger)
        device = engine.grid.device
        use = DeviceUse(device) if engine.grid.rank == 0 else None
        self.report = StepReport(start, self.logger, device, use)
        self.evaluation = Evaluation(engine, batches, run)
        self.drill = ResumeDrill(engine, batches, checkpoints, run)
        self.end = RunEnd(start, run, checkpoints)
        self.profile = RunProfile(start, engine, run)
        self.spikes = SpikeReaction(start, engine, run, checkpoints)
        self.bundles = SpikeBundles(start, engine, run)
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
        run = self.opened, self.start, self.engine, self.checkpoints
        if chosen.path is None:
            begin(*run, self.evaluation)
            return
        resumed = resume(*run, chosen, chosen.path)
        self.first_step, self.owes_score = resumed.first_step, resumed.owes_score

    def run(self) -> int:
        """Train to the end of the stage or to a stop request; returns the exit code. Collective."""
        # From here on a signal stops the run after a step, with a save.
        self.monitor.stop.end_start()
        if (asked := self.evaluation.asked or self.monitor.agreed_stop()) is not None:
            return self.end.stop(asked, skip_verification=True)
        self.opened.starting = False
        self.checkpoints.restart_clock()
        try:
            code = self._react()
            if code is None and self.owes_score:
                code = self._score_loaded()
            if self.state.step < self.order.total_steps:
                self.logger.progress(f"step {self.state.step + 1} of {self.order.total_steps}")
            while code is None and self.state.step < self.order.total_steps:
                self.profile.before_step(self.state.step + 1)
                code = self._step()
                self.profile.after_step(self.state.step)
            self.profile.close()
            code = self.end.finish() if code is None else code
        except (DamagedChunkError, UnavailableChunkError):
            # All ranks leave together, so the save of the previous chunk can still finish.
            self.checkpoints.wait(self.state.step)
            raise
        self.engine.optimizer.finish()
        return code

    def _step(self) -> int | None:
        """Train a step and do what it asks for; returns an exit code if the run ends with it."""
        state = self.state
        self.drill.before_step()
        state.step += 1
        self.report.begins(state.step)
        result, agreed = self.train_step()

        decision = state.guard.finite.observe(result.applied or result.outlier)
        # A step that is not finite says nothing of the outliers around it.
        if decision == "apply":
            self.spikes.count(result.outlier)
        if not result.applied:
            self.report.skipped(state, result)
        # All ranks see the same sums, so all of them stop here.
        if decision == "stop":
            return self.end.not_finite()
        # A rank could not save or record; the flag reaches all ranks at the same step.
        if agreed.failed:
            self.checkpoints.wait(state.step)
            raise SaveError(self.logger.problem or RECORD_REFUSED)

        # Asked to stop, a run that is to go back saves as usual: the next start goes back.
        if agreed.stop is None and (code := self._react()) is not None:
            return code

        reason = agreed.stop or self._limit_reached()
        # Between bad steps only a stop saves: if they end the run, the next start goes back before
        # the first of them, and what damaged them may be gone. What was asked for is made later.
        self.owes_save |= agreed.save_asked
        wanted = agreed.save_due or self.owes_save
        required = reason is not None or (wanted and result.applied)
        # A chunk's numbered checkpoint also serves a request that falls on its end.
        if self.order.is_chunk_end(state.step):
            self._end_chunk(required, scored=agreed.stop is None)
            reason = reason or self.evaluation.asked
        elif required:
            consumed = self.order.consumed_chunks(state.step)
            self._save(checkpoint_name(consumed, state.step), None)
        self.spikes.keep_twin()

        if reason is not None and (state.step < self.order.total_steps or self.owes_score):
            return self.end.stop(reason, skip_verification=reason != STEP_LIMIT)
        return None

    def train_step(self) -> tuple[StepResult, Agreed]:
        """Train the step of the state's number, and report it; collective."""
        began, state = time.monotonic(), self.state
        self.profile.step_began(state.step, began)
        flags = self.monitor.begin_step(
            state.step,
            saving=self.checkpoints.writer.active,
            save_due=self.checkpoints.is_due(state.step),
            failed=self.checkpoints.writer.failed or bool(self.logger.problem),
        )
        fault_injection.set_step(state.step)
        fault_injection.point("step.read")
        first = state.step == self.first_step
        with self.profile.phase("data"):
            batch = self.batches.step(state.step, first, self.engine.needs_batch)

        lr = self.start.setup.learning_rate(state.step, self.order.total_steps)
        shared = [*self.batches.fed_ids, *flags]
        # A request that comes while the step computes is shared with it.
        self.monitor.share_late_stop(shared, FLAGS)
        row_targets = batch[0].row_targets if batch else None
        self.exposure.begin(self.order, state.step, row_targets)
        try:
            result = self.engine.train_step(batch, lr, shared)
        except UnrepeatableError as error:
            self.report.rechecked(state.step, error.found)
            raise DamageError(f"step {state.step}: {error}") from None
        self.profile.step_computed()
        subsets = self.exposure.end()

        # The host has waited for the device by now, so this is the real time of the step.
        seconds = self.profile.step_ended(began)
        self.checkpoints.step_done(seconds)
        agreed = self.monitor.end_step(seconds, result.flags[FLAGS:])
        fed_ids = self.batches.fed(state.step, result.flags[:FLAGS])
        if result.applied:
            state.loss = result.loss

        root = self.monitor.root()
        if root is not None:
            self.logger.root(state.step, root)
        state_root = None if root is None else root.root
        self.report.done(
            Done(state.step, result, lr, seconds, fed_ids, state_root, subsets, row_targets)
        )
        if agreed.slow is not None:
            self.logger.event(
                Straggler(attempt=self.logger.attempt, step=state.step, told=agreed.slow)
            )
            self.logger.info(agreed.slow)

        self.drill.step_done(result, lr, fed_ids)
        fault_injection.point("step.done")
        if result.recheck is not None:
            self.report.rechecked(state.step, result.recheck)
        if result.applied:
            verdicts = self.report.spikes(state, result, lr)
            self.spikes.observe(verdicts)
            self.bundles.observe(verdicts, batch, result, lr)
        return result, agreed

    def _react(self) -> int | None:
        """Stop the run, or leave it to go back, if a spike asks for it; returns the exit code.

        A run that goes back is asked for again like one that was stopped: `spikes.goes_back` says
        how. Collective.
        """
        if not self.spikes.problem and self.spikes.is_due:
            self.spikes.go_back(self.first_step)
        if self.spikes.problem:
            return self.end.spike(self.spikes.problem, self.spikes.how_to_decide())
        return None if self.spikes.goes_back is None else EXIT_STOPPED

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
            with self.profile.phase("evaluate"):
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
        with self.profile.phase("save"):
            self.checkpoints.save(name, self.state, held_out)

    def _score_loaded(self) -> int | None:
        """Score the end of the chunk that was loaded, and save it under its number.

        Returns the exit code if the run is asked to stop meanwhile.
        """
        self._end_chunk(required=True, scored=True)
        asked = self.evaluation.asked
        return None if asked is None else self.end.stop(asked, skip_verification=True)
