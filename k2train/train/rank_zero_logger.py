"""Run logging on rank 0: ledger, metrics, console and mirrors (W&B, TensorBoard).

- A signal does not interrupt a write: what is on disk and what is known of it stay equal.
- Lines that the disk does not take are kept in memory and retried; `problem` reports it to the
  trainer when that takes too long.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import RLock
from uuid import uuid4

from k2train.checkpoint.manifest import (
    CheckpointManifest,
    checkpoint_order,
    manifest_sha256,
    read_manifest,
)
from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.checkpoint.writer import SaveError
from k2train.commands import program_text
from k2train.config.load import to_yaml
from k2train.data.held_out import OWN
from k2train.errors import CheckpointError
from k2train.files import write_synced
from k2train.guard.crash_loop import STARTS
from k2train.guard.failure_history import read_history
from k2train.guard.stop_signals import StopRequest
from k2train.parallel.device_digest import StateRoot
from k2train.record.event import Event
from k2train.record.events import (
    CheckpointDamaged,
    CheckpointRemoved,
    CheckpointSaved,
    CheckpointVerified,
    Entry,
    Failed,
    Finished,
    Resumed,
    Started,
    Stopped,
    of_kind,
)
from k2train.record.held_out import (
    HeldOutRecord,
    ScoresRecord,
    loss_text,
    score_lines,
)
from k2train.record.ledger import Ledger
from k2train.record.ledger_head import LedgerHead
from k2train.record.metrics import (
    MetricsWriter,
    RootRecord,
    StepRecord,
    damaged_rows,
    last_attempt,
    last_step,
)
from k2train.record.score_files import complete_scores
from k2train.retry import exists_retried, reason
from k2train.state_digest import short_digests
from k2train.text import bytes_text
from k2train.train.checkpoint_events import checkpoint_saved, score_of
from k2train.train.mirrors import Mirrors, open_mirrors, site_of
from k2train.train.open_console import open_console, stage_facts
from k2train.train.preflight import Start
from k2train.train.run_logger import RunLogger
from k2train.train.spike_history import spike_number, was_seen_before

ENDS = (Failed, Stopped, Finished)


class RankZeroRunLogger(RunLogger):
    """Logger that writes into the run directory."""

    def __init__(self, start: Start, stop: StopRequest | None = None, device: str = ""):
        """Open the record of `start`, which computes on `device` ("": a CPU).

        `stop` holds its signals back during writes.
        """
        config, directory = start.setup.config, start.directory
        self.ledger = Ledger(directory / "ledger.jsonl")
        self.metrics = MetricsWriter(directory / "metrics.jsonl")
        # Counted in both files: a start may have died before it wrote to one of them.
        events = [entry.event for entry in self.ledger.entries]
        attempts = [event.attempt for event in events if isinstance(event, STARTS)]

        self.attempt = max([last_attempt(directory / "metrics.jsonl"), *attempts]) + 1
        self.history = read_history(self.ledger.entries, self.metrics.path, self.attempt)
        self.console = open_console(start, device)

        self._from_threads: deque[str] = deque()
        self._writing = RLock()
        self._stop = StopRequest() if stop is None else stop
        self._unwritten: dict[Path, deque[tuple[Path, Callable[[], object]]]] = {}
        """Name of a queue -> files and their writes that the disk has not taken yet, in order."""
        self._write_error = ""
        self._failing_since: float | None = None
        self._retry_seconds = config.checkpoint.retry_seconds

        self.roots = MetricsWriter(directory / "state_roots.jsonl")
        self.held_out = MetricsWriter(directory / "held_out.jsonl")

        text = to_yaml(config)
        write_synced(directory / "config.yaml", text)
        self.config_sha256 = hashlib.sha256(text.encode()).hexdigest()

        started = self.ledger.last(Started)
        self.run_id = started.run_id if started else uuid4().hex

        flops, log = stage_facts(start).rank_flops_per_token, self._from_threads.append
        made = open_mirrors(config, directory, self.run_id, self.attempt, flops, log)
        self.mirrors = Mirrors(made, self.metrics.path, site_of(config))
        self.mirrors.history(self.ledger.entries)

        self._report_damage(start)
        self._complete_scores()

    def _report_damage(self, start: Start) -> None:
        """Say what a killed writer left behind, and which rows are damaged or lost."""
        rows = (self.metrics, self.roots, self.held_out)
        for repaired in (self.ledger.repaired, *(file.repaired for file in rows)):
            if repaired:
                self.info(repaired)
        for path in (file.path for file in rows):
            for line in damaged_rows(path) if exists_retried(path) else []:
                self.info(f"damaged: {line}")
        known = read_manifest(start.candidates[0]).step if start.candidates else 0
        if (last := last_step(self.metrics.path)) < known:
            self.info(
                f"{self.metrics.path} ends with step {last}, {start.candidates[0].name} is of step "
                f"{known}: lines are lost; restore the file if you can "
                f"({program_text('verify_run')} says what is missing)"
            )

    def _complete_scores(self) -> None:
        """Write the scores that a killed writer had written to the metrics alone."""
        try:
            added = complete_scores(self.metrics.path, self.held_out)
        except OSError as error:
            # It decides over no start, and the next one does it.
            added = f"{self.held_out.path} is not complete: {reason(error, self.held_out.path)}"
        if added:
            self.info(added)

    @property
    def ledger_head(self) -> LedgerHead | None:
        return self.ledger.head

    @property
    def entries(self) -> Sequence[Entry]:
        return self.ledger.entries

    def event(self, event: Event) -> None:
        self._put(self.ledger.path, lambda: self.ledger.append(event))
        self.mirrors.event(event)

    def step(self, record: StepRecord) -> None:
        self._put(self.metrics.path, lambda: self.metrics.write(record))
        self.mirrors.step(record)
        self.flush_messages()
        self.console.step(record)

    def scores(self, step: int, scores: Sequence[HeldOutFacts], seconds: float) -> None:
        # Together the lines have the time of the whole evaluation.
        share = seconds / max(1, sum(one.targets for one in scores))
        records = [
            HeldOutRecord.of_score(step, self.attempt, score, share * score.targets)
            for score in map(score_of, scores)
        ]
        if not records:
            return

        metrics, held_out = self.metrics, self.held_out
        self._put(metrics.path, partial(metrics.write, ScoresRecord.of_records(records)))
        for record in records:
            # What the metrics have, a start can add here, but not the other way round.
            self._put(held_out.path, partial(held_out.write, record), behind=metrics.path)
            self.mirrors.score(record)

    def has_end_of(self, attempt: int) -> bool:
        events = [entry.event for entry in self.ledger.entries]
        return any(isinstance(event, ENDS) and event.attempt == attempt for event in events)

    def spike_number(self, onset: int) -> int:
        return spike_number(self.ledger.entries, onset)

    def was_seen_before(self, first_step: int, steps: int) -> bool:
        return was_seen_before(self.ledger.entries, first_step, steps)

    def all_written(self) -> bool:
        with self._stop.held(), self._writing:
            self._write()
            if self._unwritten:
                self.problem = f"{self._write_error}; make room, then start the same command again"
            return not self._unwritten

    def _put(self, path: Path, write: Callable[[], object], behind: Path | None = None) -> None:
        """Queue a write behind those that the disk has not taken yet, and try all of them.

        Those are the ones of its own file, or of the file `behind`.
        """
        # During a start a signal raises wherever it falls: between a line and the note of its size,
        # too, after which the line would be written again, or taken for another process's.
        with self._stop.held(), self._writing:
            self._unwritten.setdefault(behind or path, deque()).append((path, write))
            self._write()

    def _write(self) -> None:
        # In order within a queue: a later line must not overtake one that the disk refused.
        for name, lines in list(self._unwritten.items()):
            try:
                while lines:
                    lines[0][1]()
                    lines.popleft()
                del self._unwritten[name]
            except OSError as error:
                self._write_failed(lines[0][0], error)

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

    def progress(self, text: str, at_once: bool = False) -> None:
        self.flush_messages()
        self.console.progress(text, at_once)

    def sync_rows(self) -> None:
        # After a power loss a resume does not repeat the steps of a checkpoint.
        # A row of the metrics names a root: its line is on the disk before.
        for rows in (self.roots, self.metrics, self.held_out):
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
        saved = replace(checkpoint_saved(path, manifest), stalled_seconds=stalled)
        self.event(replace(saved, seconds=round(seconds, 3)))

        own = next((part for part in saved.held_out or () if part.name == OWN), None)
        loss = manifest.held_out_loss
        score = "" if loss is None else f", held-out loss {loss:.4f}"
        if own is not None:
            score = f", held-out {loss_text(own)}"
        self.info_from_thread(
            f"saved {path.name} at step {manifest.step}{score} "
            f"({bytes_text(manifest.total_bytes)} in {seconds:.1f} s)"
            + ("" if saved.asked is None else f"; kept, asked for by {saved.asked}")
        )

        for line in score_lines(saved.held_out or (), OWN):
            self.info_from_thread(line)

        if self.problem:
            # No step may follow that would inform the other ranks; the end of a save does.
            raise SaveError(self.problem)

    def verified(self, path: Path) -> None:
        self.event(CheckpointVerified(attempt=self.attempt, checkpoint=path.name))

    def damaged(self, path: Path, problem: str) -> None:
        self.event(CheckpointDamaged(attempt=self.attempt, checkpoint=path.name, problem=problem))
        self.info_from_thread(f"damaged: {problem}")

    def removed(self, path: Path, why: str) -> None:
        self.event(CheckpointRemoved(attempt=self.attempt, checkpoint=path.name, reason=why))
        self.info_from_thread(f"removed {path.name}, saved inside a chunk: {why}")

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
                self.event(replace(checkpoint_saved(path, read_manifest(path)), recovered=True))

    def close(self) -> None:
        self.flush_messages()
        self.console.close()
        self.mirrors.close()
        self.flush_messages()

    def flush_messages(self) -> None:
        while self._from_threads:
            self.console.info(self._from_threads.popleft())
