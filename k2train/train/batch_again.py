"""Cause of a spike: its batch again with an older state, on one process of a CPU.

- A checkpoint at least `APART_STEPS` before the onset computes the loss and the gradient norm of
  the onset's batch, and of the steps before it as controls. Still far above the controls: the data
  alone. Like them: the data with the state that the run had by then.
- The state right before the onset would prove nothing: it is the state that the alarm came with.
- Each batch is a training step at rate 0: loss and norm as in training, and the weights stay.
- A checkpoint loads on any layout, so the run may have been trained on another one.

Alternatives considered:
- Comparing with the loss that was usual in the run: an older state is worse on every batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import ValidationError

from k2train.checkpoint.load import load_states
from k2train.checkpoint.manifest import CheckpointManifest, list_checkpoints, read_manifest
from k2train.config.load import Config
from k2train.data.inspect.fed_steps import fingerprint_of_rows
from k2train.data.inspect.run_progress import order_of_checkpoint
from k2train.data.inspect.run_usage import Run
from k2train.data.loader import Loader, Share
from k2train.data.manifest import Manifest
from k2train.data.order import ChunkOrder
from k2train.errors import CheckpointError, RunError
from k2train.parallel.grid import ProcessGrid
from k2train.record.ledger import read_ledger
from k2train.record.recent_steps import recent_steps
from k2train.train.bundle_read import Bundle
from k2train.train.deferral import recorded_checkpoint
from k2train.train.engine import Engine
from k2train.train.setup import Setup

APART_STEPS = 20
"""Steps from the older state to the onset, at least."""
CONTROLS = 8
"""Steps before the onset whose batches show what is usual for the older state."""
STILL_BAD = 0.5
"""Share of the jump that the run saw, from which on the older state sees it, too."""


@dataclass(frozen=True)
class Measured:
    """Loss and gradient norm of a step's batch with the older state."""

    step: int
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Jump:
    """How far a channel was above the usual: in the run, and with the older state."""

    channel: str
    unit: str
    run: float
    older: float

    @property
    def share(self) -> float:
        """Share of the run's jump that the older state sees."""
        return self.older / self.run if self.run > 0 else 0.0


@dataclass(frozen=True)
class Bisection:
    """What an older state makes of a spike's batch."""

    checkpoint: str
    checkpoint_step: int
    batch: Measured
    controls: tuple[Measured, ...]
    jumps: tuple[Jump, ...]

    @property
    def is_data_alone(self) -> bool:
        """Whether the batch is bad for the older state, too."""
        # A value that is not finite is as bad as it gets.
        found = [jump.share for jump in self.jumps]
        return any(not math.isfinite(share) or share >= STILL_BAD for share in found)


def bisect_spike(run: Path, bundle: Bundle, data: Path | None = None) -> Bisection:
    """Do the batch of a spike again from the checkpoint before it.

    In a process group of this process alone. Raises RunError, CheckpointError or DataError when
    the run no longer has what this needs.
    """
    path, manifest = _checkpoint(run, bundle)
    config = one_process_config(manifest)
    entries = read_ledger(run / "ledger.jsonl")
    recorded = recorded_checkpoint(manifest)
    chunks = Run(run, entries, recorded, recorded, data).manifest
    order = order_of_checkpoint(chunks, recorded.order, config.batch.global_sequences)
    _check_ids(run, bundle, chunks, order)

    grid = ProcessGrid(Setup.of(config, 1).layout, 0, torch.device("cpu"))
    engine = Engine(Setup(config, grid.layout), grid, fill=False)
    shards = engine.gradients.shard_layout, engine.optimizer.flat_shards
    load_states(path, *shards, grid, engine.dtype, lambda: None)
    engine.optimizer.write_parameters()
    steps = [s for s in range(bundle.step - CONTROLS, bundle.step + 1) if s >= 1]
    *controls, batch = _measure(engine, chunks, order, steps)
    if not controls:
        raise RunError(f"step {bundle.step} has no step before it to compare with")
    return Bisection(
        manifest.name, manifest.step, batch, tuple(controls), jumps_of(bundle, batch, controls)
    )


def jumps_of(bundle: Bundle, batch: Measured, controls: Sequence[Measured]) -> tuple[Jump, ...]:
    """Compare the jump of each channel that raised the alarm with that of the older state."""
    opened = bundle.opened
    channels = tuple(opened.get("channels") or ("loss",))
    found = []
    if "loss" in channels or "grad_norm" not in channels:
        older = batch.loss - median(one.loss for one in controls)
        run = float(opened["loss"]) - float(opened["usual_loss"])
        found.append(Jump("loss", "nat", run, older))
    if "grad_norm" in channels:
        usual = median(one.grad_norm for one in controls)
        run = _log_ratio(float(opened["grad_norm"]), float(opened["usual_grad_norm"]))
        found.append(Jump("gradient norm", "e-folds", run, _log_ratio(batch.grad_norm, usual)))
    return tuple(found)


def one_process_config(manifest: CheckpointManifest) -> Config:
    """Return the config of a checkpoint's run for one process of a CPU: the same model and batch.

    Raises CheckpointError when the manifest holds no such config.
    """
    tree: dict[str, Any] = {**manifest.config, "parallel": {}, "kernels": {}}
    tree["run"] = {**dict(tree.get("run", {})), "init_from": None}
    try:
        return Config.model_validate(tree)
    except (ValidationError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{manifest.name}: its config cannot be used: {text[:200]}") from None


def _checkpoint(run: Path, bundle: Bundle) -> tuple[Path, CheckpointManifest]:
    """Return the newest checkpoint that is far enough before the onset, and comes to that batch."""
    folder = run / "checkpoints"
    for path in reversed(list_checkpoints(folder)):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        if manifest.step <= bundle.onset - APART_STEPS and _leads_to(manifest, bundle):
            return path, manifest
    raise RunError(
        f"{folder} has no checkpoint of step {max(0, bundle.onset - APART_STEPS)} or before, from "
        f"which the run comes to {bundle.event['chunk']} at its step {bundle.step}"
    )


def _leads_to(manifest: CheckpointManifest, bundle: Bundle) -> bool:
    """Whether the checkpoint's order has the bundle's chunk at the bundle's position."""
    order, index = manifest.chunks.order, bundle.event["order_index"]
    return index < len(order) and order[index].name == bundle.event["chunk"]


def _check_ids(run: Path, bundle: Bundle, chunks: Manifest, order: ChunkOrder) -> None:
    """Raise RunError when the rows are not those of the bundle, or not what the step was fed."""
    name, rows = order.position(bundle.step).name, order.rows_of(bundle.step)
    if (name, [rows.start, rows.stop]) != (bundle.event["chunk"], bundle.event["rows"]):
        raise RunError(
            f"step {bundle.step} reads {name} rows {rows.start}-{rows.stop - 1} by the checkpoint, "
            f"the bundle says {bundle.event['chunk']} rows {bundle.event['rows']}"
        )
    here = fingerprint_of_rows(chunks, chunks.chunk(name), rows, chunks.has_masks)
    for record in recent_steps(run / "metrics.jsonl", bundle.step, bundle.step):
        of_bundle = record.attempt == bundle.event.get("attempt")
        if of_bundle and record.ids is not None and record.ids != here:
            raise RunError(
                f"step {bundle.step} was fed ids with the hash {record.ids}, the rows have {here}: "
                "the data is not what was trained on"
            )


def _measure(
    engine: Engine, chunks: Manifest, order: ChunkOrder, steps: Sequence[int]
) -> list[Measured]:
    config = engine.config
    share = Share(0, 1, config.batch.micro_sequences)
    found = []
    with Loader(
        chunks, order, share, config.model.vocab_size, documents=engine.setup.block
    ) as loader:
        for step in steps:
            # At rate 0 the weights stay as they are.
            result = engine.train_step(loader.step(step), 0.0)
            found.append(Measured(step, result.loss, result.grad_norm))
    return found


def _log_ratio(value: float, usual: float) -> float:
    return math.log(value / usual) if value > 0 and usual > 0 else math.nan
