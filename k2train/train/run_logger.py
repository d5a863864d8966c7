"""Run logging on rank 0: ledger, metrics, console and W&B.

- The other ranks get a no-op logger with the same methods, so the training loop needs no
  `if rank == 0`.
- Lines that the disk does not take are kept in memory and retried; `problem` reports it to the
  trainer when that takes too long.
"""

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock
from uuid import uuid4

from k2train.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    checkpoint_order,
    manifest_sha256,
    read_manifest,
)
from k2train.checkpoint.writer import SaveError
from k2train.config.load import to_yaml
from k2train.errors import CheckpointError
from k2train.files import sha256_file, write_synced
from k2train.guard.crash_loop import STARTS
from k2train.guard.failure_history import FailureHistory, read_history
from k2train.parallel.device_digest import StateRoot
from k2train.record.console import Console
from k2train.record.events import (
    CheckpointDamaged,
    CheckpointSaved,
    CheckpointVerified,
    Event,
    Failed,
    Finished,
    Resumed,
    Started,
    Stopped,
    Takeover,
    of_kind,
)
from k2train.record.ledger import Ledger
from k2train.record.ledger_head import LedgerHead
from k2train.record.metrics import (
    MetricsWriter,
    RootRecord,
    StepRecord,
    damaged_rows,
    last_attempt,
)
from k2train.record.wandb import WandbMirror, WandbRun, wandb_run_id
from k2train.retry import exists_retried, reason
from k2train.state_digest import short_digests
from k2train.text import bytes_text
from k2train.train.preflight import Start

ENDS = (Failed, Stopped, Finished)


class RunLogger:
    """No-op logger with all methods, for every rank but rank 0."""

    attempt = 0
    fencing_token = 0
    """Token of the lease that rank 0 holds."""
    taken_over_from: Takeover | None = None
    """Earlier holder of the run directory that did not release it."""
    memory = "malloc: default settings"
    """The host's malloc settings."""
    problem = ""
    """Why the record could not be written; the trainer shares it with all ranks."""
    config_sha256 = ""
    """Hash of `config.yaml` as this start wrote it."""
    faults: tuple[str, ...] = ()
    """Faults armed on purpose, on any rank."""
    run_id = ""
    """Identifies the training run across restarts."""
    history = FailureHistory()
    """Failures and saves of the starts before this one; known to rank 0."""

    @property
    def ledger_head(self) -> LedgerHead | None:
        """Head of the ledger; None where another rank writes it."""
        return None

    def event(self, event: Event) -> None:
        """Append an event to the ledger."""

    def step(self, record: StepRecord) -> None:
        """Log a finished step."""

    def has_end_of(self, attempt: int) -> bool:
        """Return whether the ledger records how a start ended."""
        return False

    def all_written(self) -> bool:
        """Return whether everything logged so far is on disk."""
        return True

    def info(self, text: str) -> None:
        """Log a human-readable line."""

    def sync_rows(self) -> None:
        """Sync the rows of all steps so far; called before a checkpoint is committed."""

    def committed(
        self,
        path: Path,
        manifest: CheckpointManifest,
        seconds: float,
        stalled_seconds: float | None = None,
    ) -> None:
        """Log that a checkpoint is whole after `seconds`; may be called from the saving thread.

        Training waited for `stalled_seconds` of them; None: for all.
        """

    def verified(self, path: Path) -> None:
        """Log that a checkpoint was read back intact; from any thread."""

    def damaged(self, path: Path, problem: str) -> None:
        """Log that a checkpoint is damaged; from any thread."""

    def info_from_thread(self, text: str) -> None:
        """Log a human-readable line; from any thread."""

    def flush_messages(self) -> None:
        """Show the lines of other threads; called from the main thread."""

    def root(self, step: int, root: StateRoot) -> None:
        """Log the state root after a step."""

    def recover(self, checkpoints: Sequence[Path]) -> None:
        """Add checkpoints to the ledger that a kill kept out of it."""

    def close(self) -> None:
        """End the live line and the W&B mirror."""


class RankZeroRunLogger(RunLogger):
    """Logger that writes into the run directory."""

    def __init__(self, start: Start):
        config, directory = start.setup.config, start.directory
        self.ledger = Ledger(directory / "ledger.jsonl")
        self.metrics = MetricsWriter(directory / "metrics.jsonl")
        # Counted in both files: a start may have died before it wrote to one of them.
        events = [entry.event for entry in self.ledger.entries]
        attempts = [event.attempt for event in events if isinstance(event, STARTS)]

        self.attempt = max([last_attempt(directory / "metrics.jsonl"), *attempts]) + 1
        self.history = read_history(self.ledger.entries, self.metrics.path, self.attempt)
        order = start.order
        # Last step of every chunk.
        ends = [order.first_step(i) + order.steps_in(i) - 1 for i in range(len(order.names))]
        self.console = Console(
            sys.stderr, config.run.name, order.total_steps, len(order.names), ends
        )

        self._from_threads: deque[str] = deque()
        self._writing = RLock()
        self._unwritten: dict[Path, deque[Callable[[], object]]] = {}
        """File -> writes that the disk has not taken yet, in order."""
        self._write_error = ""
        self._failing_since: float | None = None
        self._retry_seconds = config.checkpoint.retry_seconds

        self.roots = MetricsWriter(directory / "state_roots.jsonl")

        text = to_yaml(config)
        write_synced(directory / "config.yaml", text)
        self.config_sha256 = hashlib.sha256(text.encode()).hexdigest()

        started = self.ledger.last(Started)
        self.run_id = started.run_id if started else uuid4().hex

        self.wandb = WandbMirror(
            WandbRun(
                config.wandb.mode,
                config.wandb.project,
                config.run.name,
                wandb_run_id(self.run_id),
                config.model_dump(mode="json"),
            ),
            directory,
            log=self._from_threads.append,
        )

        # Report what a killed writer left behind, and rows whose checksum is wrong.
        for repaired in (self.ledger.repaired, self.metrics.repaired, self.roots.repaired):
            if repaired:
                self.info(repaired)
        for path in (self.metrics.path, self.roots.path):
            for line in damaged_rows(path) if exists_retried(path) else []:
                self.info(f"damaged: {line}")

    @property
    def ledger_head(self) -> LedgerHead | None:
        return self.ledger.head

    def event(self, event: Event) -> None:
        self._put(self.ledger.path, lambda: self.ledger.append(event))

    def step(self, record: StepRecord) -> None:
        self._put(self.metrics.path, lambda: self.metrics.write(record))
        self.wandb.log(record)
        self.flush_messages()
        self.console.step(record)

    def has_end_of(self, attempt: int) -> bool:
        events = [entry.event for entry in self.ledger.entries]
        return any(isinstance(event, ENDS) and event.attempt == attempt for event in events)

    def all_written(self) -> bool:
        with self._writing:
            self._write()
            if self._unwritten:
                self.problem = f"{self._write_error}; make room, then start the same command again"
            return not self._unwritten

    def _put(self, path: Path, write: Callable[[], object]) -> None:
        """Queue a write behind those that the disk has not taken yet, and try all of them."""
        with self._writing:
            self._unwritten.setdefault(path, deque()).append(write)
            self._write()

    def _write(self) -> None:
        # In order within a file: a later line must not overtake one that the disk refused.
        for path, lines in list(self._unwritten.items()):
            try:
                while lines:
                    lines[0]()
                    lines.popleft()
                del self._unwritten[path]
            except OSError as error:
                self._write_failed(path, error)

        if not self._unwritten:
            self._failing_since, self.problem = None, ""

    def _write_failed(self, path: Path, error: OSError) -> None:
        now = time.monotonic()
        self._write_error = f"{path} cannot be written: {reason(error, path)}"
        if self._failing_since is None:
            self._failing_since = now
            self.info_from_thread(
                f"{self._write_error} "
                f"(kept in memory and tried again for {self._retry_seconds:g} s)"
            )

        if now - self._failing_since >= self._retry_seconds:
            self.problem = f"{self._write_error}; make room, then start the same command again"

    def info(self, text: str) -> None:
        self.flush_messages()
        self.console.info(text)

    def sync_rows(self) -> None:
        # After a power loss a resume does not repeat the steps of a checkpoint.
        for rows in (self.metrics, self.roots):
            try:
                rows.sync()
            except OSError as error:
                self.info_from_thread(f"{rows.path} cannot be synced: {error.strerror or error}")

    def committed(
        self,
        path: Path,
        manifest: CheckpointManifest,
        seconds: float,
        stalled_seconds: float | None = None,
    ) -> None:
        stalled = None if stalled_seconds is None else round(stalled_seconds, 3)
        saved = replace(_checkpoint_saved(path, manifest), stalled_seconds=stalled)
        self.event(replace(saved, seconds=round(seconds, 3)))

        held_out = manifest.held_out_loss
        score = "" if held_out is None else f", held-out loss {held_out:.4f}"
        self.info_from_thread(
            f"saved {path.name} at step {manifest.step}{score} "
            f"({bytes_text(manifest.total_bytes)} in {seconds:.1f} s)"
        )

        self.wandb.event(f"saved {path.name}")
        if self.problem:
            # No step may follow that would inform the other ranks; the end of a save does.
            raise SaveError(self.problem)

    def verified(self, path: Path) -> None:
        self.event(CheckpointVerified(attempt=self.attempt, checkpoint=path.name))

    def damaged(self, path: Path, problem: str) -> None:
        self.event(CheckpointDamaged(attempt=self.attempt, checkpoint=path.name, problem=problem))
        self.info_from_thread(f"damaged: {problem}")

    def info_from_thread(self, text: str) -> None:
        # The console belongs to the main thread.
        self._from_threads.append(text)

    def root(self, step: int, root: StateRoot) -> None:
        record = RootRecord(step, self.attempt, root.root, short_digests(root.digests))
        self._put(self.roots.path, lambda: self.roots.write(record))

    def recover(self, checkpoints: Sequence[Path]) -> None:
        recorded = {
            (saved.checkpoint, saved.manifest_sha256)
            for saved in of_kind(self.ledger.entries, CheckpointSaved)
        }

        # What the last resume found was compared then, and later saves have later names: the cost
        # grows with what is new, not with the run.
        names = {name for name, _ in recorded}
        resumed = [event.checkpoint for event in of_kind(self.ledger.entries, Resumed)][-1:]
        compared = max(map(checkpoint_order, resumed), default=(-1, 0))
        for path in checkpoints:
            if path.name in names and checkpoint_order(path.name) <= compared:
                continue
            try:
                # By content: another checkpoint of this name may have been set aside since.
                known = (path.name, manifest_sha256(path)) in recorded
            except CheckpointError as error:
                # Older than the one that was taken: it decides over no start.
                self.info(f"damaged: {error}")
                continue
            if not known:
                self.event(replace(_checkpoint_saved(path, read_manifest(path)), recovered=True))

    def close(self) -> None:
        self.flush_messages()
        self.console.close()
        self.wandb.close()
        self.flush_messages()

    def flush_messages(self) -> None:
        while self._from_threads:
            self.console.info(self._from_threads.popleft())


def _checkpoint_saved(path: Path, manifest: CheckpointManifest) -> CheckpointSaved:
    """Return the ledger's event of a checkpoint."""
    return CheckpointSaved(
        checkpoint=path.name,
        attempt=manifest.attempt,
        step=manifest.step,
        chunks_consumed=manifest.chunks.consumed,
        consumed_tokens=manifest.consumed_tokens,
        loss=manifest.loss,
        held_out_loss=manifest.held_out_loss,
        bytes=manifest.total_bytes,
        manifest_sha256=sha256_file(path / MANIFEST),
    )
