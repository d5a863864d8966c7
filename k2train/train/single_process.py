"""Losses and gradients of a model on one process, outside of a run: for notebooks and checks.

- The engine of training computes them, so they are what a step of a run would have.
- Nothing is updated and nothing written. A process group of this process alone is opened for it.
- A batch may have any number of rows, of any length. The engine is built anew for another shape,
  and takes the weights over.

Alternatives considered:
- A model of its own for notebooks: it would answer for another model than the one that trains.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from k2train.checkpoint.blocks import MASTER
from k2train.checkpoint.load import load_states
from k2train.config.load import Config
from k2train.data.loader import MicroBatch
from k2train.errors import ConfigError, DataError, RunError
from k2train.json_record import first_mistake
from k2train.launch.environment import Launch
from k2train.parallel.cross_entropy import IGNORE
from k2train.parallel.grid import ProcessGrid, start_process_group, stop_process_group
from k2train.train.engine import Engine
from k2train.train.setup import Setup


@dataclass(frozen=True)
class Gradients:
    """What a step would begin with: loss, and the gradient of every weight."""

    loss: float
    """Mean over all targets of the batch (nats per target)."""
    grad_norm: float
    """Global norm of all gradients, before clipping."""
    by_name: Mapping[str, Tensor]
    """fp32 gradient of the mean loss, by the global name of the tensor."""


class SingleProcess:
    """A model on this process: of a checkpoint, or with the initial weights of a config.

    `config` is a run's, as a tree of sections; its layout is left out. Close it, or use it as a
    context: at most one may be open. Raises ConfigError, CheckpointError, and RunError where a
    process group is open already.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        checkpoint: Path | None = None,
        precision: str = "fp32",
        device: torch.device | None = None,
    ) -> None:
        self._tree, self._checkpoint, self._precision = config, checkpoint, precision
        self.device = device or torch.device("cpu")
        self._engine: Engine | None = None
        self._shape = (0, 0)
        if dist.is_initialized():
            raise RunError("this process has a process group already: close the model before")
        start_process_group(Launch(0, 1, 0, launched=False), self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and the process group; a second time nothing happens."""
        self._engine = None
        stop_process_group()

    def gradients(
        self, tokens: Tensor, labels: Tensor | None = None, documents: Tensor | None = None
    ) -> Gradients:
        """Compute loss and gradients of the batch `tokens` [rows, length].

        `labels` [rows, length] are the tokens unless given: position i predicts label i+1, and
        -100 is not learned. `documents` [rows, length] is the number of each token's document in
        its row, where `data.cross_documents` is block; without it a row is one document.
        Raises DataError for a batch that the model cannot read.
        """
        engine, batch, targets = self._ready(tokens, labels, documents)
        done = engine.compute_gradients(batch, targets)
        sums, layout = done.decision.read(), engine.gradients.shard_layout
        by_name = {
            slot.param_slice.name: layout.local(done.gradient, slot)
            .view(slot.param_slice.shape)
            .clone()
            for slot in layout.slots
        }
        return Gradients(sums.loss, sums.grad_norm, by_name)

    def losses(
        self, tokens: Tensor, labels: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Return the mean loss of each row (nats per target), fp64 [rows], without gradients.

        Arguments and errors are those of `gradients`. NaN where a row has no target.
        """
        engine, batch, _ = self._ready(tokens, labels, documents)
        counted = (batch[0].targets[:, 1:] != IGNORE).sum(1).double().cpu()
        return engine.row_losses(batch, 1) / counted

    def _ready(
        self, tokens: Tensor, labels: Tensor | None, documents: Tensor | None
    ) -> tuple[Engine, list[MicroBatch], int]:
        """Return an engine for the batch's shape, the batch on its device, and its targets."""
        tokens = torch.as_tensor(tokens).long()
        if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
            raise DataError(f"a batch is [rows, length], length 2 or more; it is {[*tokens.shape]}")
        labels = tokens if labels is None else torch.as_tensor(labels).long()
        for name, part in (("labels", labels), ("documents", documents)):
            if part is not None and part.shape != tokens.shape:
                raise DataError(f"{name} are {[*part.shape]}, tokens {[*tokens.shape]}")

        engine = self._engine_for((int(tokens.shape[0]), int(tokens.shape[1])))
        vocabulary = engine.architecture.vocab_size
        used = torch.cat((tokens.flatten(), labels[labels != IGNORE]))
        if int(used.min()) < 0 or int(used.max()) >= vocabulary:
            raise DataError(
                f"ids are from {int(used.min())} to {int(used.max())}, the model has {vocabulary}"
            )
        targets = int((labels[:, 1:] != IGNORE).sum())
        if targets == 0:
            raise DataError("no label of the batch is learned: all are -100, or the first ones")

        if engine.setup.block:
            documents = torch.zeros_like(tokens) if documents is None else documents
            documents = torch.as_tensor(documents).int()
        elif documents is not None:
            raise DataError("documents are for data.cross_documents: block, and it is attend")
        return engine, [MicroBatch(tokens, documents, labels).to(self.device)], targets

    def _engine_for(self, shape: tuple[int, int]) -> Engine:
        if self._engine is not None and self._shape == shape:
            return self._engine

        config = one_process_config(self._tree, *shape, self._precision)
        setup = Setup.of(config, 1)
        grid = ProcessGrid(setup.layout, 0, self.device)
        before = self._engine
        engine = Engine(setup, grid, fill=before is None and self._checkpoint is None)
        shards = engine.optimizer.flat_shards
        if before is not None:
            shards[MASTER].copy_(before.optimizer.flat_shards[MASTER])
            engine.optimizer.write_parameters()
        elif self._checkpoint is not None:
            load_states(self._checkpoint, engine.gradients.shard_layout, shards, grid, engine.dtype)
            engine.optimizer.write_parameters()
        self._engine, self._shape = engine, shape
        return engine


def one_process_config(
    tree: Mapping[str, Any], rows: int, length: int, precision: str = "fp32"
) -> Config:
    """Return the config of a run for one process and a batch of `rows` x `length` tokens.

    Raises ConfigError when the tree is no config.
    """
    changed: dict[str, Any] = {**tree, "parallel": {}, "kernels": {}, "precision": precision}
    run, data = dict(tree.get("run", {})), dict(tree.get("data", {}))
    changed["run"] = {**run, "init_from": None, "exact": False}
    changed["data"] = {**data, "sequence_length": length}
    changed["batch"] = {"global_sequences": rows, "micro_sequences": rows}
    try:
        return Config.model_validate(changed)
    except ValidationError as error:
        raise ConfigError(f"the config cannot be used: {first_mistake(error)}") from None
