"""Choosing, loading and saving checkpoints for the trainer.

- Sits between the training loop, which knows steps, and the checkpoint package, which knows files.
- Stores a forward check (a known-answer test of the model) with every save and repeats it after
  every load. A checkpoint with correct bytes whose model computes something else is refused
  before the first step.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k2train import fault_injection
from k2train.checkpoint.load import agree_on_checkpoint, load_states
from k2train.checkpoint.manifest import read_manifest
from k2train.checkpoint.writer import CheckpointWriter, no_op
from k2train.config.load import Config
from k2train.errors import CheckpointError
from k2train.parallel.grid import ProcessGrid
from k2train.record.jsonl import json_value
from k2train.run_lock.lock import RunLock
from k2train.train.engine import Engine
from k2train.train.forward_check import forward_check_problem, run_forward_check
from k2train.train.monitor import DamageError
from k2train.train.preflight import Start
from k2train.train.run_logger import RunLogger

Facts = dict[str, Any]


class CheckpointManager:
    """Checkpoints of one rank.

    `logger` is called at each use, because the logger is opened after the checkpoint was chosen.
    """

    def __init__(
        self,
        config: Config,
        grid: ProcessGrid,
        start: Start,
        lock: RunLock | None,
        logger: Callable[[], RunLogger],
    ):
        self.config, self.grid, self.start, self.lock, self._logger = (
            config,
            grid,
            start,
            lock,
            logger,
        )
        c = config.checkpoint
        self.writer = CheckpointWriter(
            start.checkpoints,
            grid,
            c.keep_optimizer_states,
            c.asynchronous,
            retry_seconds=c.retry_seconds,
            verify_every_seconds=c.verify_every_seconds,
            check_owner=no_op if lock is None else lock.check,
            log=lambda text: logger().info_from_thread(text),
            on_verified=lambda path: logger().verified(path),
            on_damaged=lambda path, problem: logger().damaged(path, problem),
            on_idle=lambda: logger().flush_messages(),
        )
        self.token = 0 if lock is None else lock.token
        """Fencing token of this start; rank 0's, broadcast to the others."""
        self.saved_at = time.monotonic()
        """Monotonic time at which the last save began."""

    def choose(self) -> tuple[Path | None, list[str]]:
        """Agree on the checkpoint to resume from; collective.

        Returns the checkpoint (None for a fresh start) and the reasons why others were refused.
        Raises CheckpointError when no candidate is whole, or the one of `run.init_from` is not.
        """
        chosen, refused = agree_on_checkpoint(self.start.candidates, self.grid)
        fault_injection.point("start.agreed")

        refused = [*self.start.refused, *refused]
        if self.start.candidates and chosen is None:
            raise CheckpointError(
                f"no checkpoint in {self.start.checkpoints} is whole: {'; '.join(refused)}"
            )

        if self.start.parent is not None:
            parent, problems = agree_on_checkpoint([self.start.parent], self.grid)
            if parent is None:
                raise CheckpointError(f"run.init_from: {problems[0]}")

        if chosen is not None:
            self.writer.mark_verified(chosen)
        return chosen, refused

    def load(self, engine: Engine, path: Path) -> tuple[Facts, bool]:
        """Load the checkpoint at `path` into the engine; collective.

        Returns the manifest, and whether the checkpoint had optimizer states.
        Raises CheckpointError when it belongs to another model, or the forward check fails.
        """
        facts, optimizer = read_manifest(path), engine.optimizer
        if not isinstance(facts.get("guard"), dict):
            raise CheckpointError(
                f"{path}: the manifest says nothing of the guard's state; it was changed or damaged"
            )

        kept = load_states(
            path, engine.gradients.shard_layout, optimizer.flat_shards, self.grid, engine.dtype
        )
        # A thinned checkpoint has no moments; they start from zero.
        optimizer.adam_steps = int(facts["adam_steps"]) if kept else 0
        optimizer.write_parameters()

        problem = forward_check_problem(facts.get("probe") or {}, run_forward_check(engine))
        if problem is not None and "probe" not in self.config.run.allow:
            raise CheckpointError(
                f"{path} was loaded, but the model does not compute what was saved: {problem}; "
                "find out why, or continue with run.allow=[probe]"
            )
        if problem is not None:
            self._logger().info(f"allowed by run.allow: {problem}")
        fault_injection.point("start.loaded")
        return facts, kept

    def save(
        self, engine: Engine, name: str, facts: Facts, committed: Callable[[Path, Facts], None]
    ) -> None:
        """Start a save, or complete it when saving is synchronous; collective.

        Rank 0 calls `committed(path, manifest)` when the checkpoint is whole.
        Raises DamageError when data-parallel replicas disagree in the forward check.
        Raises SaveError when the save before this one failed.
        """
        # Before the snapshot: damaged replicas must not be saved.
        probe = run_forward_check(engine)
        if probe["apart"]:
            raise DamageError(str(probe["apart"]))

        # A copy in host memory, so training continues while it is written.
        frozen = self.writer.snapshot(
            engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype
        )
        adam_steps = engine.optimizer.adam_steps
        facts = {**facts, "adam_steps": adam_steps, "probe": probe, "fencing_token": self.token}
        # A loss that is not finite has no JSON form of its own.
        self.writer.save(name, frozen, dict(json_value(facts)), committed)
        self.saved_at = time.monotonic()

    def lease_facts(self) -> Facts:
        """Return the holder of the run directory, for the ledger."""
        return {
            "fencing_token": self.token,
            "taken_over_from": None if self.lock is None else self.lock.taken_over_from,
        }
