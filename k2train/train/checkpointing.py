"""Loading and saving checkpoints for the trainer.

- Sits between the training loop, which knows steps, and the checkpoint package, which knows files.
- Stores a forward check (a known-answer test of the model) with every save and repeats it after
  every load. A checkpoint with correct bytes whose model computes something else is refused
  before the first step.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from k2train import fault_injection
from k2train.checkpoint.load import (
    RefusedCheckpointError,
    load_states,
)
from k2train.checkpoint.manifest import (
    CheckpointManifest,
    DataFacts,
    DataPosition,
    LedgerFacts,
    SaveFacts,
    read_manifest,
)
from k2train.checkpoint.run_facts import ForwardAnswer, HeldOutFacts, LayoutFacts, RunIdentity
from k2train.checkpoint.save_events import SaveEvents, SavePolicy
from k2train.checkpoint.writer import CheckpointWriter, named
from k2train.data.held_out import OWN
from k2train.errors import CheckpointError
from k2train.guard.failure_history import SaveCost
from k2train.guard.save_interval import SaveInterval, SaveTimer
from k2train.record.events import SaveIntervalChosen
from k2train.record.jsonl import json_value
from k2train.record.system_info import environment_facts
from k2train.run_lock.lock import RunLock
from k2train.train.choose import Chosen, choose_next
from k2train.train.engine import Engine
from k2train.train.forward_check import forward_check_problem, run_forward_check
from k2train.train.matmul_choice import product_facts
from k2train.train.monitor import DamageError, RunMonitor
from k2train.train.preflight import Start
from k2train.train.run_logger import RunLogger
from k2train.train.state import TrainState


def _interval_event(chosen: SaveInterval, attempt: int, step: int) -> SaveIntervalChosen:
    """Return the ledger's event of an interval."""
    return SaveIntervalChosen(
        attempt=attempt,
        step=step,
        seconds=None if chosen.seconds is None else round(chosen.seconds, 3),
        first_seconds=None if chosen.first_seconds is None else round(chosen.first_seconds, 3),
        failures=chosen.failures,
        trained_seconds=round(chosen.trained_seconds, 3),
        mtbf_seconds=round(chosen.mtbf_seconds, 3),
        stall_seconds=round(chosen.stall_seconds, 3),
        save_seconds=round(chosen.save_seconds, 3),
    )


def _rope_theta(manifest: CheckpointManifest) -> float | None:
    """Base of the positions that a checkpoint's run computed with; None if it does not say."""
    model = manifest.config.get("model")
    theta = model.get("rope_theta") if isinstance(model, dict) else None
    return float(theta) if isinstance(theta, int | float) else None


class CheckpointManager(SaveEvents):
    """Checkpoints of one rank: of this engine, told to monitor and logger. `lock` is rank 0's."""

    def __init__(
        self,
        start: Start,
        engine: Engine,
        monitor: RunMonitor,
        logger: RunLogger,
        lock: RunLock | None,
    ):
        self.start, self.config, self.engine = start, start.setup.config, engine
        self.monitor, self.logger, self.lock = monitor, logger, lock
        c = self.config.checkpoint
        policy = SavePolicy(
            c.keep_optimizer_states,
            c.asynchronous,
            c.retry_seconds,
            c.verify_every_seconds,
            None if c.keep_asked == "all" else c.keep_asked,
        )
        self.writer = CheckpointWriter(start.checkpoints, engine.grid, policy, self)
        self._began, self._stalled, self._took = time.monotonic(), 0.0, 0.0
        self.on_load: Callable[[Path, CheckpointManifest], None] = lambda path, manifest: None
        """Called on every rank when a checkpoint was loaded to train from it."""
        self.on_save: Callable[[str, TrainState], None] = lambda name, state: None
        """Called on every rank when a save begins."""
        self.on_committed: Callable[[Path], None] = lambda path: None
        """Called on rank 0 when a checkpoint has its name, maybe from the saving thread."""
        self.on_end: Callable[[], None] = lambda: None
        """Called on every rank when no step follows, and no save is under way."""

        order = start.order
        longest = max(order.steps_in(index) for index in range(len(order.names)))
        self.timer = SaveTimer(
            c.every_seconds if start.room_inside_chunks else 0.0,
            longest * c.every_chunks,
            engine.grid.layout.world_size,
            logger.history,
        )
        self._told: SaveInterval | None = None

    def is_due(self, step: int) -> bool:
        """Whether it is time for a save at the end of `step`; rank 0's clock decides."""
        if self.engine.grid.rank != 0:
            return False
        self._tell_interval(step)
        return self.timer.is_due(time.monotonic(), self.writer.active)

    def _tell_interval(self, step: int) -> None:
        """Log the interval that the run has chosen, when it matters and has changed much."""
        now = self.timer.interval
        if now is None or now.is_close_to(self._told):
            return
        if self._told is not None or now.failures or now.saves_inside:
            self._told = now
            self.logger.event(_interval_event(now, self.logger.attempt, step))
            self.logger.info(now.text())

    def step_done(self, seconds: float) -> None:
        """Note how long a step took."""
        self.timer.step_done(seconds)

    def restart_clock(self) -> None:
        """Count the time to the next save from now."""
        self.timer.restart(time.monotonic())

    def wait(self, step: int, skip_verification: bool = False) -> None:
        """Wait until the running save is complete. Raises its error.

        With `skip_verification` the save is neither retried nor read back.
        """
        self.monitor.phase("save", step)
        if skip_verification:
            self.writer.skip_verification()
        if self.writer.active:
            self.logger.progress("writing the checkpoint")
        self.writer.wait()
        self.logger.progress("")

    def load(self, path: Path) -> tuple[CheckpointManifest, bool]:
        """Load the checkpoint at `path` into the engine; collective.

        Returns the manifest, and whether the checkpoint had optimizer states.
        Raises RefusedCheckpointError when it is not whole, CheckpointError when it belongs to
        another model, or the forward check fails.
        """
        self.logger.progress(f"loading {path.name}", at_once=True)
        manifest, kept = self.read_state(path)
        self.logger.progress("")
        self.on_load(path, manifest)
        fault_injection.point("start.loaded")
        return manifest, kept

    def read_state(self, path: Path) -> tuple[CheckpointManifest, bool]:
        """Fill the engine with the state at `path`, as `load`, without going on from there."""
        engine, optimizer = self.engine, self.engine.optimizer
        manifest = read_manifest(path)
        kept = load_states(
            path,
            engine.gradients.shard_layout,
            optimizer.flat_shards,
            engine.grid,
            engine.dtype,
            self.monitor.watchdog.progress,
        )
        # A thinned checkpoint has no moments; they start from zero.
        optimizer.adam_steps = manifest.adam_steps if kept else 0
        optimizer.write_parameters()

        # The weights answer as they were saved: with the base of the positions of that run.
        with engine.rope_theta(_rope_theta(manifest) or self.config.model.rope_theta):
            problem = forward_check_problem(manifest.probe, run_forward_check(engine))
        if problem is not None and "probe" not in self.config.run.allow:
            raise CheckpointError(
                f"{path} was loaded, but the model does not compute what was saved: {problem}; "
                "find out why, or continue with run.allow=[probe]"
            )
        if problem is not None:
            self.logger.info(f"allowed by run.allow: {problem}")
        return manifest, kept

    def load_newest(self, chosen: Chosen, path: Path) -> tuple[Chosen, Path, CheckpointManifest]:
        """Load the chosen checkpoint at `path`, or the newest before it that is whole; collective.

        Returns the one that was loaded. Raises CheckpointError when none is.
        """
        while True:
            try:
                return chosen, path, self.load(path)[0]
            except RefusedCheckpointError as error:
                problem = str(error)

            self.monitor.phase("choose", 0)
            progress = self.monitor.watchdog.progress
            chosen = choose_next(self.start, self.engine.grid, chosen, problem, progress)
            assert chosen.path is not None, "candidates were left, or that is an error"
            path = chosen.path
            self.logger.info(f"refused: {problem}; next is {path.name}")
            self.monitor.phase("load", chosen.step)

    def load_parent(self, path: Path) -> tuple[CheckpointManifest, bool]:
        """`load` the checkpoint of `run.init_from`, which has no other to fall back on."""
        try:
            return self.load(path)
        except RefusedCheckpointError as error:
            raise CheckpointError(f"run.init_from: {error}") from None

    def save(self, name: str, state: TrainState, held_out: Sequence[HeldOutFacts] | None) -> None:
        """Start a save, or complete it when saving is synchronous; collective.

        `held_out` are the scores of these weights; None where they were not scored.

        Raises DamageError when data-parallel replicas disagree in the forward check.
        Raises SaveError when the save before this one failed.
        """
        # Before the wait: the save before, which ends in it, does not meet a request of now.
        asked = self.monitor.asked(name)
        # The save before may take long; what the ranks then do together (check, copy) may not.
        self.wait(state.step)
        self.logger.progress(f"saving {name}")
        engine, self._began = self.engine, time.monotonic()
        self.monitor.phase("evaluate", state.step, spent_on="save")

        # Before the snapshot: damaged replicas must not be saved.
        probe = run_forward_check(engine)
        if probe.apart:
            raise DamageError(probe.apart)

        # A copy in host memory, so training continues while it is written.
        frozen = self.writer.snapshot(
            engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype
        )
        state.adam_steps = engine.optimizer.adam_steps
        facts = self.facts(state, held_out, probe, asked)
        self.on_save(name, state)
        self._stalled = time.monotonic() - self._began
        self.writer.save(name, frozen, facts)

        now = time.monotonic()
        self.timer.saving(now)
        if not self.config.checkpoint.asynchronous:
            self.timer.saved(SaveCost(now - self._began, self._took))
        # Restart the watchdog's clock when a save follows another one at once.
        self.monitor.saving(False)
        self.logger.progress("")

    def facts(
        self,
        state: TrainState,
        held_out: Sequence[HeldOutFacts] | None,
        probe: ForwardAnswer,
        asked: str | None,
    ) -> SaveFacts:
        """Build the content of the manifest, but for what the writer adds: names and hashes."""
        config, start, order, data = self.config, self.start, self.start.order, self.start.manifest
        consumed = order.consumed_chunks(state.step)
        within = consumed < len(order.names)
        head, products = self.logger.ledger_head, product_facts(self.engine.kernels)
        measured: dict[str, Any] = {} if products is None else {"products": products}

        return SaveFacts(
            # A number that is not finite has no JSON form of its own.
            **json_value(state.to_json()),
            attempt=self.logger.attempt,
            asked=asked,
            held_out_loss=next((part.loss for part in held_out or () if part.name == OWN), None),
            # Without a set to score, as in older versions.
            held_out=tuple(held_out or ()) or None,
            lr=start.setup.learning_rate(state.step, order.total_steps) if state.step else None,
            consumed_tokens=state.step * start.setup.step_tokens,
            chunks=DataPosition(
                consumed=consumed,
                step_in_chunk=state.step - (order.first_step(consumed) - 1) if within else 0,
                order=start.identity["data"]["order"],
            ),
            data=DataFacts(
                manifest=str(data.path),
                manifest_sha256=data.sha256,
                content_sha256=data.content_sha256,
                tokenizer_sha256=data.tokenizer_sha256,
                vocab_size=data.vocab_size,
                sequence_length=data.sequence_length,
            ),
            layout=LayoutFacts(**asdict(start.layout)),
            config=config.model_dump(mode="json"),
            identity=RunIdentity.model_validate(start.identity),
            probe=probe,
            **measured,
            environment=environment_facts(),
            fencing_token=self.logger.fencing_token,
            ledger=None if head is None else LedgerFacts(events=head.events, sha256=head.sha256),
        )

    # What the writer tells, from its threads.

    def check_owner(self) -> None:
        # Rows should be durable before the checkpoint is: a resume does not take these steps again.
        self.logger.sync_rows()
        if self.lock is not None:
            self.lock.check()

    def committed(self, path: Path, manifest: CheckpointManifest) -> None:
        self.monitor.saved(path.name)
        self.writer.newest = named(path.name, manifest.step)
        self._took = time.monotonic() - self._began
        stalled = self._stalled if self.config.checkpoint.asynchronous else None
        if stalled is not None:
            self.timer.saved(SaveCost(stalled, self._took))
        self.logger.committed(path, manifest, self._took, stalled)
        self.on_committed(path)

    def removed(self, path: Path, why: str) -> None:
        self.logger.removed(path, why)

    def verified(self, path: Path) -> None:
        self.logger.verified(path)

    def damaged(self, path: Path, problem: str) -> None:
        self.logger.damaged(path, problem)

    def message(self, text: str) -> None:
        self.logger.info_from_thread(text)

    def idle(self) -> None:
        self.logger.flush_messages()
