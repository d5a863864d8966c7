"""Choosing, loading and saving checkpoints for the trainer.

- Sits between the training loop, which knows steps, and the checkpoint package, which knows files.
- Stores a forward check (a known-answer test of the model) with every save and repeats it after
  every load. A checkpoint with correct bytes whose model computes something else is refused
  before the first step.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2train import fault_injection
from k2train.checkpoint.load import agree_on_checkpoint, load_states
from k2train.checkpoint.manifest import (
    CheckpointManifest,
    DataFacts,
    DataPosition,
    SaveFacts,
    read_manifest,
)
from k2train.checkpoint.save_events import SaveEvents, SavePolicy
from k2train.checkpoint.verify import no_progress
from k2train.checkpoint.writer import CheckpointWriter
from k2train.errors import CheckpointError
from k2train.parallel.grid import ProcessGrid
from k2train.record.jsonl import json_value
from k2train.record.system_info import environment_facts
from k2train.run_lock.lock import RunLock
from k2train.text import counted
from k2train.train.engine import Engine
from k2train.train.forward_check import forward_check_problem, run_forward_check
from k2train.train.monitor import DamageError, RunMonitor
from k2train.train.preflight import Start
from k2train.train.resume_check import check_same_run
from k2train.train.run_logger import RunLogger
from k2train.train.start_point import check_resumable
from k2train.train.state import TrainState

SHOWN = 3
"""Refused checkpoints that a message names, newest first."""


@dataclass(frozen=True)
class Chosen:
    """Checkpoint that all ranks verified and agreed on; none for a fresh start."""

    path: Path | None
    manifest: CheckpointManifest | None
    refused: tuple[str, ...] = ()
    """Reasons why newer ones were refused."""
    allowed: tuple[str, ...] = ()
    """Differences from the checkpoint's run that `run.allow` permits by name."""

    @property
    def step(self) -> int:
        """Step to continue from."""
        return 0 if self.manifest is None else self.manifest.step


def choose_checkpoint(
    start: Start, grid: ProcessGrid, progress: Callable[[], None] = no_progress
) -> Chosen:
    """Agree on the checkpoint to resume from; collective. `progress` is called while it hashes.

    Raises CheckpointError when no candidate is whole or of this run, or the one of `run.init_from`
    is not whole.
    """
    path, problems = agree_on_checkpoint(start.candidates, grid, check_resumable, progress)
    fault_injection.point("start.agreed")

    refused = (*start.refused, *problems)
    if start.candidates and path is None:
        raise CheckpointError(_none_whole(start, refused))

    if start.parent is not None:
        parent, problems = agree_on_checkpoint([start.parent], grid, progress=progress)
        if parent is None:
            raise CheckpointError(f"run.init_from: {problems[0]}")

    if path is None:
        return Chosen(None, None, refused)
    allowed = check_same_run(path, start.identity, start.setup.config.run.allow)
    return Chosen(path, read_manifest(path), refused, tuple(allowed))


def _none_whole(start: Start, refused: Sequence[str]) -> str:
    """Say what was tried, and why it was refused."""
    asked = len(start.candidates) == 1 and isinstance(start.setup.config.run.resume, int)
    tried = (
        f"the {counted(len(refused), 'checkpoint')} with optimizer states in {start.checkpoints}"
    )
    more = len(refused) - SHOWN
    return (
        (
            f"{start.candidates[0]} (run.resume) is not whole: "
            if asked
            else f"none of {tried} is whole: "
        )
        + "; ".join(refused[:SHOWN])
        + (f"; and {more} more" if more > 0 else "")
        + "; restore one of them, or start anew under another run.name"
    )


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
            c.keep_optimizer_states, c.asynchronous, c.retry_seconds, c.verify_every_seconds
        )
        self.writer = CheckpointWriter(start.checkpoints, engine.grid, policy, self)
        self._began = self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time for a save; rank 0's clock decides."""
        every = self.config.checkpoint.every_seconds
        on_first = self.engine.grid.rank == 0
        return every > 0 and on_first and time.monotonic() - self._saved_at >= every

    def restart_clock(self) -> None:
        """Count the time to the next save from now."""
        self._saved_at = time.monotonic()

    def wait(self, step: int, skip_verification: bool = False) -> None:
        """Wait until the running save is complete. Raises its error.

        With `skip_verification` the save is neither retried nor read back.
        """
        self.monitor.phase("save", step)
        if skip_verification:
            self.writer.skip_verification()
        self.writer.wait()

    def load(self, path: Path) -> tuple[CheckpointManifest, bool]:
        """Load the checkpoint at `path` into the engine; collective.

        Returns the manifest, and whether the checkpoint had optimizer states.
        Raises CheckpointError when it belongs to another model, or the forward check fails.
        """
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

        problem = forward_check_problem(manifest.probe or {}, run_forward_check(engine))
        if problem is not None and "probe" not in self.config.run.allow:
            raise CheckpointError(
                f"{path} was loaded, but the model does not compute what was saved: {problem}; "
                "find out why, or continue with run.allow=[probe]"
            )
        if problem is not None:
            self.logger.info(f"allowed by run.allow: {problem}")
        fault_injection.point("start.loaded")
        return manifest, kept

    def save(self, name: str, state: TrainState, held_out_loss: float | None) -> None:
        """Start a save, or complete it when saving is synchronous; collective.

        Raises DamageError when data-parallel replicas disagree in the forward check.
        Raises SaveError when the save before this one failed.
        """
        # The save before may take long; what the ranks then do together (check, copy) may not.
        self.wait(state.step)
        engine, self._began = self.engine, time.monotonic()
        self.monitor.phase("evaluate", state.step)

        # Before the snapshot: damaged replicas must not be saved.
        probe = run_forward_check(engine)
        if probe["apart"]:
            raise DamageError(str(probe["apart"]))

        # A copy in host memory, so training continues while it is written.
        frozen = self.writer.snapshot(
            engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype
        )
        state.adam_steps = engine.optimizer.adam_steps
        self.writer.save(name, frozen, self._facts(state, held_out_loss, probe))
        self.restart_clock()
        # Restart the watchdog's clock when a save follows another one at once.
        self.monitor.saving(False)

    def _facts(
        self, state: TrainState, held_out_loss: float | None, probe: dict[str, Any]
    ) -> SaveFacts:
        """Build the content of the manifest, but for what the writer adds: names and hashes."""
        config, start, order, data = self.config, self.start, self.start.order, self.start.manifest
        consumed = order.consumed_chunks(state.step)
        within = consumed < len(order.names)

        return SaveFacts(
            # A number that is not finite has no JSON form of its own.
            **json_value(state.to_json()),
            attempt=self.logger.attempt,
            held_out_loss=held_out_loss,
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
                tokenizer_sha256=data.tokenizer_sha256,
                vocab_size=data.vocab_size,
                sequence_length=data.sequence_length,
            ),
            layout=asdict(start.layout),
            config=config.model_dump(mode="json"),
            identity=start.identity,
            probe=json_value(probe),
            environment=environment_facts(),
            fencing_token=self.logger.fencing_token,
        )

    # What the writer tells, from its threads.

    def check_owner(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def committed(self, path: Path, manifest: CheckpointManifest) -> None:
        self.monitor.saved()
        self.logger.committed(path, manifest, time.monotonic() - self._began)

    def verified(self, path: Path) -> None:
        self.logger.verified(path)

    def damaged(self, path: Path, problem: str) -> None:
        self.logger.damaged(path, problem)

    def message(self, text: str) -> None:
        self.logger.info_from_thread(text)

    def idle(self) -> None:
        self.logger.flush_messages()
