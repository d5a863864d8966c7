"""Bundle of a spike: what a person needs to judge it, in files of the folder `spikes/spike_NNN`.

- Written at the alarm: by a verdict of 100 steps later the step's state is gone, and the run may
  have gone back. The verdict that closes the event is added to `event.json`.
- `event.json`: what, when, on which rows. `sequences.jsonl`: loss of every sequence of the step,
  the highest with text and sources. `tensors.jsonl`: statistics of every tensor.
  `batches.jsonl`: rows of the steps around. `steps.jsonl`: the last rows of the metrics.
  `config.yaml`: the config.
- Losses are those of the weights after the step, since the alarm comes with the step's update.
- Bounded: one forward pass of the batch, at most `MOST_BYTES` and `MOST_BUNDLES`. What cannot be
  written is told, and the run goes on.

Alternatives considered:
- The bundle only of malignant spikes: which one it is, is known too late.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from k2train.checkpoint.manifest import checkpoint_order, list_checkpoints
from k2train.commands import program_text
from k2train.config.load import to_yaml
from k2train.data.loader import MicroBatch
from k2train.data.order import ChunkOrder
from k2train.errors import UnavailableError, UserError
from k2train.files import write_synced
from k2train.guard.spike_verdict import SpikeVerdict
from k2train.record.jsonl import json_value
from k2train.record.metrics import StepRecord
from k2train.record.recent_steps import recent_steps
from k2train.retry import exists_retried, is_folder_retried, list_retried
from k2train.safe_json import read_json
from k2train.text import counted
from k2train.train.engine import Engine
from k2train.train.preflight import Start
from k2train.train.sequence_texts import described_sequences
from k2train.train.shutdown import OpenRun
from k2train.train.spike_history import OPENINGS
from k2train.train.spike_names import (
    BATCHES,
    CONFIG,
    EVENT,
    SEQUENCES,
    SPIKES,
    STEPS,
    TENSORS,
    spike_folder,
)
from k2train.train.step_result import StepResult
from k2train.train.tensor_statistics import TensorStatistics, tensor_statistics

HIGHEST = 16
"""Sequences with text."""
AROUND = 8
"""Steps on each side whose rows are listed."""
LAST_STEPS = 300
MOST_BYTES = {SEQUENCES: 400_000, TENSORS: 350_000, STEPS: 200_000, BATCHES: 20_000}
"""Size of each file; what is beyond it is left out, and counted in its last line."""
MOST_BUNDLES = 100
CLOSINGS = ("benign", "malignant", "level")


class SpikeBundles:
    """Writes the bundles of one run; every method is collective."""

    def __init__(self, start: Start, engine: Engine, run: OpenRun):
        self.start, self.engine, self.opened = start, engine, run
        self.logger = run.logger

    def observe(
        self,
        verdicts: Sequence[SpikeVerdict],
        batch: Sequence[MicroBatch],
        result: StepResult,
        lr: float,
    ) -> None:
        """Write a bundle for each spike that a step opened, and the end of one that it closed."""
        for verdict in verdicts:
            if verdict.kind in OPENINGS:
                self.write_bundle(verdict, batch, result, lr)
            elif verdict.kind in CLOSINGS and self.engine.grid.rank == 0:
                self._told(partial(self._close, verdict), verdict)

    def write_bundle(
        self, verdict: SpikeVerdict, batch: Sequence[MicroBatch], result: StepResult, lr: float
    ) -> None:
        """Write the bundle of a spike that opened with the step of `batch` and `result`."""
        step, engine = verdict.step, self.engine
        self.opened.monitor.phase("evaluate", step)
        sums = engine.row_losses(batch, engine.setup.num_microbatches).tolist()
        told = batch[0].row_targets if batch else None
        # Each row's own mean, however many of its tokens are learned.
        targets = told or [engine.config.data.sequence_length - 1] * len(sums)
        losses = [loss / count for loss, count in zip(sums, targets, strict=True)]
        tensors = tensor_statistics(engine, result, lr)
        if engine.grid.rank == 0:
            self._told(lambda: self._write(verdict, result, lr, losses, tensors), verdict)

    def _told(self, write: Callable[[], None], verdict: SpikeVerdict) -> None:
        """Write on rank 0; say why, if that fails."""
        try:
            write()
        except (OSError, UserError, UnavailableError) as error:
            self.logger.info(f"the bundle of the spike at step {verdict.onset}: {error}")

    def _folder(self, verdict: SpikeVerdict) -> Path:
        return spike_folder(self.start.directory, self.logger.spike_number(verdict.onset))

    def _write(
        self,
        verdict: SpikeVerdict,
        result: StepResult,
        lr: float,
        losses: Sequence[float],
        tensors: Sequence[TensorStatistics],
    ) -> None:
        folder, start, step = self._folder(verdict), self.start, verdict.step
        if not exists_retried(folder / EVENT) and _bundles(start.directory) >= MOST_BUNDLES:
            raise UserError(f"not written, there are {counted(MOST_BUNDLES, 'bundle')} already")

        steps = recent_steps(start.directory / "metrics.jsonl", step - LAST_STEPS + 1, step)
        order = start.order
        sequences, notes = described_sequences(
            start.manifest,
            order.position(step).name,
            order.rows_of(step),
            losses,
            HIGHEST,
        )
        folder.mkdir(parents=True, exist_ok=True)
        _write_lines(folder / SEQUENCES, [_short(one) for one in sequences])
        _write_lines(folder / TENSORS, [_short(_tensor_row(one)) for one in tensors])
        _write_lines(folder / BATCHES, batch_rows(order, step, steps))
        _write_lines(folder / STEPS, [record.row() for record in reversed(steps)])
        write_synced(folder / CONFIG, to_yaml(start.setup.config))

        # Last: a folder with it is whole.
        event = self._event(verdict, result, lr, notes)
        _write_json(folder / EVENT, event)
        self.logger.info(
            f"what the step was: {program_text('spike')} {start.directory} {event['number']}"
        )

    def _event(
        self, verdict: SpikeVerdict, result: StepResult, lr: float, notes: Sequence[str]
    ) -> dict[str, Any]:
        order, step = self.start.order, verdict.step
        position, rows = order.position(step), order.rows_of(step)
        before = checkpoint_before(self.start.checkpoints, order, verdict.onset)
        layout = self.start.layout
        return {
            "number": self.logger.spike_number(verdict.onset),
            "attempt": self.logger.attempt,
            "run": self.start.setup.config.run.name,
            "opened": verdict.row(),
            "closed": None,
            "chunk": position.name,
            "order_index": position.order_index,
            "rows": [rows.start, rows.stop],
            "lr": lr,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "update_norm": result.update_norm,
            "layout": f"tensor {layout.tensor}, pipeline {layout.pipeline}, data {layout.data}",
            "checkpoint_before": before,
            "sequences": "losses with the weights after the step",
            "notes": list(notes),
        }

    def _close(self, verdict: SpikeVerdict) -> None:
        """Add the verdict that ended an event to its bundle, and the steps up to it."""
        folder = self._folder(verdict)
        if not exists_retried(folder / EVENT):
            return
        event = read_json(folder / EVENT)
        step, metrics = verdict.step, self.start.directory / "metrics.jsonl"
        steps = recent_steps(metrics, min(verdict.onset - LAST_STEPS // 2, step - LAST_STEPS), step)
        _write_lines(folder / STEPS, [record.row() for record in reversed(steps)])
        _write_json(folder / EVENT, {**event, "closed": verdict.row()})


def checkpoint_before(folder: Path, order: ChunkOrder, onset: int) -> str | None:
    """Return the newest checkpoint of a step before `onset`, by its name; None without one."""
    consumed = order.consumed_chunks(onset - 1)
    at_end = onset == 1 or order.is_chunk_end(onset - 1)
    newest = (consumed, 0 if at_end else onset - 1)
    found = [path for path in list_checkpoints(folder) if checkpoint_order(path.name) <= newest]
    return found[-1].name if found else None


def batch_rows(
    order: ChunkOrder, step: int, recorded: Sequence[StepRecord]
) -> list[dict[str, Any]]:
    """Return the chunk and rows of the steps around one, and the hash of the ids if it is known."""
    ids = {record.step: record.ids for record in recorded}
    rows = []
    for at in range(max(1, step - AROUND), min(order.total_steps, step + AROUND) + 1):
        name, span = order.position(at).name, order.rows_of(at)
        row = {"step": at, "chunk": name, "rows": [span.start, span.stop]}
        rows.append({**row, "ids": ids[at]} if ids.get(at) else row)
    return rows


def _bundles(run: Path) -> int:
    folder = run / SPIKES
    return len(list_retried(folder)) if is_folder_retried(folder) else 0


def _tensor_row(one: TensorStatistics) -> dict[str, Any]:
    parts = {
        name: {"norm": part.norm, "max": part.max, "zeros": part.zeros}
        for name, part in one.parts.items()
    }
    return {"tensor": one.name, "elements": one.elements, **parts}


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as lines, as many as fit."""
    kept: list[str] = []
    left = MOST_BYTES[path.name]
    for row in rows:
        line = f"{_json(row)}\n"
        left -= len(line.encode())
        if left < 0:
            kept.append(f"{_json({'left_out': len(rows) - len(kept)})}\n")
            break
        kept.append(line)
    write_synced(path, "".join(kept))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    lines = [_json({key: value})[1:-1] for key, value in content.items()]
    write_synced(path, "{\n  " + ",\n  ".join(lines) + "\n}\n")


def _json(row: Mapping[str, Any]) -> str:
    """A row as JSON that a person reads: text of any script as it is."""
    return json.dumps(json_value(dict(row)), ensure_ascii=False, allow_nan=False)


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its numbers to 9 digits: enough to read, and half as long."""
    return {key: _rounded(value) for key, value in row.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _short(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.9g}")
    return value
