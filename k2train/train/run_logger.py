"""Rank 0's pen: one object that writes ledger, metrics, console and W&B from the trainer's facts; nothing elsewhere.

The other ranks hold a `RunLogger` too, whose methods do nothing, so the training loop has no `if rank == 0` in it.
"""

import contextlib
import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any
from uuid import uuid4

from k2train.checkpoint.manifest import MANIFEST, read_manifest
from k2train.checkpoint.writer import SaveError
from k2train.config.load import Config, to_yaml
from k2train.files import sha256_file, write_synced
from k2train.guard.crash_loop import STARTS
from k2train.parallel.device_digest import StateRoot
from k2train.record.console import Console
from k2train.record.ledger import Ledger
from k2train.record.metrics import MetricsWriter, damaged_rows, last_attempt
from k2train.record.system_info import environment_facts
from k2train.record.wandb import WandbMirror
from k2train.state_digest import short_digests
from k2train.text import bytes_text, counted
from k2train.train.engine import Engine
from k2train.train.memory_report import memory_line, spec_of
from k2train.train.preflight import Start, learning_rate

Facts = dict[str, Any]
ENDS = ("failed", "stopped", "finished")


class RunLogger:
    """What the trainer tells; the silent form, for every rank but the first."""

    attempt = 0
    problem = ""
    """What kept a step out of the metrics; the trainer tells all ranks."""
    config_sha256 = ""
    """Of `config.yaml` as this start wrote it."""
    run_id = ""
    """Names the training run across restarts."""

    def event(self, event: str, **facts: Any) -> None:
        """Append to the ledger."""

    def step(self, row: Facts) -> None:
        """One finished step."""

    def has_end_of(self, attempt: int) -> bool:
        """Whether the ledger says how a start ended."""
        return False

    def all_written(self) -> bool:
        """Whether all that was told is written."""
        return True

    def info(self, text: str) -> None:
        """A line for people."""

    def committed(self, path: Path, manifest: Facts, seconds: float) -> None:
        """A checkpoint is whole; may be called from the thread that saved it."""

    def verified(self, path: Path) -> None:
        """A checkpoint was read back whole; from any thread."""

    def damaged(self, path: Path, problem: str) -> None:
        """A checkpoint was found damaged; from any thread."""

    def info_from_thread(self, text: str) -> None:
        """A line for people, from any thread."""

    def flush_messages(self) -> None:
        """Show what other threads had to say; from the main thread."""

    def root(self, step: int, root: StateRoot) -> None:
        """The root of the state after a step."""

    def recover(self, checkpoints: Sequence[Path]) -> None:
        """Note in the ledger the checkpoints that a kill kept out of it."""

    def close(self) -> None:
        """End the live line and the mirror."""


class RankZeroRunLogger(RunLogger):
    """Writes into the run directory."""

    def __init__(self, config: Config, start: Start):
        directory = start.directory
        self.ledger = Ledger(directory / "ledger.jsonl")
        self.metrics = MetricsWriter(directory / "metrics.jsonl")
        attempts = [int(e.get("attempt", 0)) for e in self.ledger.events if e["event"] in STARTS]
        self.attempt = max([last_attempt(directory / "metrics.jsonl"), *attempts]) + 1
        order = start.order
        ends = [order.first_step(i) + order.steps_in(i) - 1 for i in range(len(order.names))]
        self.console = Console(
            sys.stderr, config.run.name, order.total_steps, len(order.names), ends
        )
        self._from_threads: deque[str] = deque()
        self._writing = RLock()
        self._unwritten: dict[Path, deque[Callable[[], object]]] = {}
        """Of each file the lines that the disk has not taken, in their order."""
        self._write_error = ""
        self._failing_since: float | None = None
        self._retry_seconds = config.checkpoint.retry_seconds
        self.roots = MetricsWriter(directory / "state_roots.jsonl")
        text = to_yaml(config)
        write_synced(directory / "config.yaml", text)
        self.config_sha256 = hashlib.sha256(text.encode()).hexdigest()
        started = self.ledger.last("started")
        self.run_id = str(started["run_id"]) if started else uuid4().hex
        self.wandb = WandbMirror(
            config.wandb.mode,
            config.wandb.project,
            config.run.name,
            self.run_id,
            directory,
            config.model_dump(mode="json"),
            log=self._from_threads.append,
        )
        for repaired in (self.ledger.repaired, self.metrics.repaired, self.roots.repaired):
            if repaired:
                self.info(repaired)
        for path in (self.metrics.path, self.roots.path):
            for line in damaged_rows(path) if path.exists() else []:
                self.info(f"damaged: {line}")

    def event(self, event: str, **facts: Any) -> None:
        self._put(self.ledger.path, lambda: self.ledger.append(event, **facts))

    def step(self, row: Facts) -> None:
        self._put(self.metrics.path, lambda: self.metrics.write(row))
        self.wandb.log(row)
        self.flush_messages()
        self.console.step(row)

    def has_end_of(self, attempt: int) -> bool:
        return any(e["event"] in ENDS and e.get("attempt") == attempt for e in self.ledger.events)

    def all_written(self) -> bool:
        with self._writing:
            self._write()
            if self._unwritten:
                self.problem = f"{self._write_error}; make room, then start the same command again"
            return not self._unwritten

    def _put(self, path: Path, write: Callable[[], object]) -> None:
        """Write a line of a file, after those that the disk has not taken yet; its turn may come later."""
        with self._writing:
            self._unwritten.setdefault(path, deque()).append(write)
            self._write()

    def _write(self) -> None:
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
        self._write_error = f"{path} cannot be written: {error.strerror or error}"
        if self._failing_since is None:
            self._failing_since = now
            self.info_from_thread(
                f"{self._write_error} (kept in memory and tried again for {self._retry_seconds:g} s)"
            )
        if now - self._failing_since >= self._retry_seconds:
            self.problem = f"{self._write_error}; make room, then start the same command again"

    def info(self, text: str) -> None:
        self.flush_messages()
        self.console.info(text)

    def committed(self, path: Path, manifest: Facts, seconds: float) -> None:
        self.event(
            "checkpoint_saved", **_checkpoint_facts(path, manifest), seconds=round(seconds, 3)
        )
        with contextlib.suppress(OSError):
            self.metrics.sync()
            self.roots.sync()
        total_bytes, held_out = _total_bytes(manifest), manifest["held_out_loss"]
        score = "" if held_out is None else f", held-out loss {float(held_out):.4f}"
        self.info_from_thread(
            f"saved {path.name} at step {manifest['step']}{score} ({bytes_text(total_bytes)} in {seconds:.1f} s)"
        )
        self.wandb.event(f"saved {path.name}")
        if self.problem:
            # No step may follow that would tell the other ranks; the end of a save tells them too.
            raise SaveError(self.problem)

    def verified(self, path: Path) -> None:
        self.event("checkpoint_verified", attempt=self.attempt, checkpoint=path.name)

    def damaged(self, path: Path, problem: str) -> None:
        self.event(
            "checkpoint_damaged", attempt=self.attempt, checkpoint=path.name, problem=problem
        )
        self.info_from_thread(f"damaged: {problem}")

    def info_from_thread(self, text: str) -> None:
        # The console belongs to the main thread.
        self._from_threads.append(text)

    def root(self, step: int, root: StateRoot) -> None:
        row = {
            "step": step,
            "attempt": self.attempt,
            "root": root.root,
            "tensors": short_digests(root.digests),
        }
        self._put(self.roots.path, lambda: self.roots.write(row))

    def recover(self, checkpoints: Sequence[Path]) -> None:
        recorded = {
            (event["checkpoint"], event.get("manifest_sha256"))
            for event in self.ledger.events
            if event["event"] == "checkpoint_saved"
        }
        for path in checkpoints:
            # By content: a name may have been another checkpoint's, which was set aside since.
            if (path.name, sha256_file(path / MANIFEST)) not in recorded:
                self.event(
                    "checkpoint_saved",
                    **_checkpoint_facts(path, read_manifest(path)),
                    recovered=True,
                )

    def close(self) -> None:
        self.flush_messages()
        self.console.close()
        self.wandb.close()
        self.flush_messages()

    def flush_messages(self) -> None:
        while self._from_threads:
            self.console.info(self._from_threads.popleft())


def _total_bytes(manifest: Facts) -> int:
    return sum(int(facts["bytes"]) for facts in manifest["files"].values())


def _checkpoint_facts(path: Path, manifest: Facts) -> Facts:
    """What the ledger says of a checkpoint."""
    return {
        "checkpoint": path.name,
        "attempt": manifest["attempt"],
        "step": manifest["step"],
        "chunks_consumed": manifest["chunks"]["consumed"],
        "consumed_tokens": manifest["consumed_tokens"],
        "loss": manifest["loss"],
        "held_out_loss": manifest["held_out_loss"],
        "bytes": _total_bytes(manifest),
        "manifest_sha256": sha256_file(path / MANIFEST),
    }


def stage_facts(config: Config, start: Start, step: int) -> Facts:
    """What a checkpoint at `step` says of its stage: position in the data, layout, config, identity, data, rate."""
    manifest, order, layout = start.manifest, start.order, start.layout
    consumed = order.consumed_chunks(step)
    return {
        "consumed_tokens": step * config.batch.global_sequences * config.data.sequence_length,
        "chunks": {
            "consumed": consumed,
            "step_in_chunk": step - (order.first_step(consumed) - 1)
            if consumed < len(order.names)
            else 0,
            "order": start.identity["data"]["order"],
        },
        "layout": {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "data": layout.data,
            "stages_per_rank": layout.stages_per_rank,
            "placement": layout.placement,
            "layers_per_stage": layout.layers_per_stage,
        },
        "config": config.model_dump(mode="json"),
        "identity": start.identity,
        "data": {
            "manifest": str(manifest.path),
            "manifest_sha256": manifest.sha256,
            "tokenizer_sha256": manifest.tokenizer_sha256,
            "vocab_size": manifest.vocab_size,
            "sequence_length": manifest.sequence_length,
        },
        "lr": learning_rate(config, step, order.total_steps) if step else None,
        "environment": environment_facts(),
    }


def start_messages(
    config: Config, start: Start, engine: Engine, parameters: int, memory: str
) -> list[str]:
    """The first lines of a run, for people; `memory` is what was set for the host's malloc."""
    layout, order, grid = start.layout, start.order, engine.grid
    work = spec_of(config, grid.device.type, engine.kernels.attention_name, engine.kernels.matmul)
    step_tokens = config.batch.global_sequences * config.data.sequence_length
    return [
        f"{parameters:,} parameters, {config.precision} on {grid.device.type}; "
        f"{counted(len(order.names), 'chunk')}, {order.total_steps} steps of {step_tokens:,} tokens; "
        f"run directory {start.directory}",
        f"tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}, "
        f"sequence parallel {'on' if engine.sequence else 'off'}, {config.parallel.schedule}, "
        f"{engine.num_microbatches} micro-batches; kernels: {engine.kernels}; {memory}",
        memory_line(config, work, layout, engine.program, grid.coordinate.pp),
    ]
