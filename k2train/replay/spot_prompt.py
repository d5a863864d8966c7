"""Spot check of the weights: the forward check's answer, computed layer by layer from the files.

- Every checkpoint holds logits of a fixed prompt that the run computed from these weights. Here one
  micro-batch of it runs through the model with one layer in memory at a time.
- It proves that the weights in the files, taken together and in this order, compute what the run
  computed. It says nothing of the moments.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from k2train.checkpoint.manifest import CheckpointManifest
from k2train.errors import CheckpointError
from k2train.model.initialize import attach_rotary, materialize
from k2train.model.transformer import Stage
from k2train.parallel.grid import ProcessGrid
from k2train.parallel.shard import named_slices
from k2train.replay.begin import Place, begin_of
from k2train.replay.read_rows import read_rows
from k2train.replay.recorded_run import RecordedRun
from k2train.train.axes import axes_of
from k2train.train.engine_parts import documents_of
from k2train.train.forward_check import bound_of, positions_of, prompt_of, samples_of
from k2train.train.matmul_choice import choice_of_manifest
from k2train.train.setup_kernels import DTYPES, kernels_of


class PromptSpot(NamedTuple):
    """How far the logits are from the recorded ones, and how far rounding may take them."""

    layers: int
    apart: float
    bound: float

    @property
    def verified(self) -> bool:
        """Whether rounding explains the distance."""
        return self.apart <= self.bound


@torch.no_grad()
def spot_prompt(run: RecordedRun, number: int, grid: ProcessGrid, place: Place) -> PromptSpot:
    """Compute the recorded logits of checkpoint `number` again, with one layer in memory.

    Raises CheckpointError when it has none, or a file is damaged.
    """
    path = run.checkpoint(number)
    manifest = run.manifest(path)
    if manifest.probe is None:
        raise CheckpointError(f"{path.name} holds no forward check: it cannot be spot-checked")
    setup = begin_of(run, manifest.config, place).setup
    tp, _, _ = axes_of(setup, grid)
    choice = choice_of_manifest(setup, grid, manifest.products)
    kernels, a = kernels_of(setup, grid.device, choice), setup.architecture

    prompt = prompt_of(setup.config, grid.device)
    # Only the first row is compared, and no row depends on another.
    x: Tensor = prompt.tokens[:1]
    documents = documents_of(prompt).rows(1) if setup.block else None
    head: Stage | None = None
    for layer in range(a.num_layers):
        first, last = layer == 0, layer == a.num_layers - 1
        module = materialize(
            partial(Stage, a, (layer,), first, last, tp, kernels),
            DTYPES[setup.config.precision],
            grid.device,
        )
        assert isinstance(module, Stage), "a stage was built"
        attach_rotary([module], a, setup.config.data.sequence_length, grid.device)
        _fill(module, run, number, manifest)
        x = module(x, documents)
        head = module
        del module
    assert head is not None, "a model has layers"

    found = samples_of(head.logits_at(x, positions_of(setup.config.data.sequence_length)).cpu())
    apart = max(
        (
            abs(mine - float("nan" if known is None else known))
            for a_row, b_row in zip(found, manifest.probe.values, strict=True)
            for mine, known in zip(a_row, b_row, strict=True)
        ),
        default=float("inf"),
    )
    largest = manifest.probe.max_abs or 0.0
    return PromptSpot(a.num_layers, apart, bound_of(manifest.probe) * largest)


def _fill(module: Stage, run: RecordedRun, number: int, manifest: CheckpointManifest) -> None:
    """Fill a stage's parameters from the files of the weights."""
    path = run.checkpoint(number)
    for parameter, part in named_slices(module):
        rows = range(part.global_shape[0])
        (values,) = read_rows(path, manifest, "model", {part.name: part.global_shape}, rows)
        part.of(parameter).copy_(values)
