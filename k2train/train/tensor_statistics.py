"""Statistics of every tensor after a step: gradient, weight, moments and update, over all ranks.

- Each rank takes the sums of its own rows, in fp64, and all ranks reduce them: gathered, they would
  be gigabytes on rank 0 of a large world. A tensor that all tensor-parallel ranks hold is counted
  once, on the first.
- The optimizer has used the gradient up: its fused kernels leave it divided for clipping. It is
  scaled back by the norm that the step has exchanged.
- The update is computed back from the moments, which follow from the step: AdamW's own formula.

Alternatives considered:
- Keeping gradient and weights of before the step: two more copies of the model, for every step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan, nan, sqrt

import torch
from torch import Tensor

from k2train.parallel.agreement import Agreement
from k2train.parallel.shard_layout import BufferSlot
from k2train.train.engine import Engine
from k2train.train.step_result import StepResult

PARTS = ("gradient", "weight", "exp_avg", "exp_avg_sq", "update")
SQUARES, LARGEST, ZEROS, VALUES = range(4)
ELEMENTS = len(PARTS) * VALUES
"""Index of the number of elements, behind the values of the parts."""


@dataclass(frozen=True)
class PartStatistics:
    """Of one part of a tensor: its norm, its largest magnitude, and the share of exact zeros."""

    norm: float
    max: float
    zeros: float


@dataclass(frozen=True)
class TensorStatistics:
    """A global tensor and the statistics of its parts, by the names of `PARTS`."""

    name: str
    elements: int
    parts: Mapping[str, PartStatistics]


@torch.no_grad()
def tensor_statistics(engine: Engine, result: StepResult, lr: float) -> list[TensorStatistics]:
    """Return the statistics of all tensors after the step of `result`; collective.

    Empty on every rank but the first.
    """
    index = {name: i for i, name in enumerate(engine.names)}
    sums = torch.zeros(len(index), ELEMENTS + 1, dtype=torch.float64)
    for slot in engine.gradients.shard_layout.slots:
        counts = slot.param_slice.dim is not None or engine.grid.tp.rank == 0
        if counts:
            _add(sums[index[slot.param_slice.name]], _parts(engine, slot, result.applied, lr))

    agreement, largest = Agreement(engine.grid), sums[:, LARGEST:ELEMENTS:VALUES].contiguous()
    totals = agreement.sum(sums, "sums of tensors")
    agreement.largest(largest, "largest values of tensors")
    if engine.grid.rank != 0:
        return []
    # The update's norm is computed in the gradient's place: its elements are gone, its norm is not.
    gone = engine.update_norm.asked and result.applied
    return [_statistics(name, totals[i], largest[i], result, gone) for name, i in index.items()]


def _parts(engine: Engine, slot: BufferSlot, applied: bool, lr: float) -> list[Tensor]:
    """Return this rank's rows of each part of a slice."""
    optimizer, h = engine.optimizer, engine.optimizer.hyperparameters
    weight, m, v = (optimizer.view(name, slot) for name in ("master", "exp_avg", "exp_avg_sq"))
    gradient = engine.gradients.shard_layout.local(engine.gradients.shard, slot)
    if not applied or optimizer.adam_steps == 0:
        return [gradient, weight, m, v, torch.zeros_like(weight)]

    t, decay = optimizer.adam_steps, h.weight_decay if slot.param_slice.decay else 0.0
    denominator = (v / (1 - h.betas[1] ** t)).sqrt_().add_(h.eps)
    moved = lr * (m / (1 - h.betas[0] ** t)) / denominator
    # The weights before it, of which the decay takes its share.
    before = (weight + moved) / (1 - lr * decay)
    return [gradient, weight, m, v, moved + lr * decay * before]


def _add(row: Tensor, parts: list[Tensor]) -> None:
    for number, part in enumerate(parts):
        if part.numel() == 0:
            continue
        flat = part.reshape(-1)
        norm = torch.linalg.vector_norm(flat, dtype=torch.float64)
        largest, zeros = flat.abs().max().double(), (flat == 0).sum().double()
        at = number * VALUES
        row[at + SQUARES] += norm.square().cpu()
        row[at + LARGEST] = torch.maximum(row[at + LARGEST], largest.cpu())
        row[at + ZEROS] += zeros.cpu()
    row[ELEMENTS] += parts[0].numel()


def _statistics(
    name: str, sums: Tensor, largest: Tensor, result: StepResult, gone: bool
) -> TensorStatistics:
    """Statistics from the sums [values] of one tensor and its largest magnitudes [parts].

    `gone`: those of the gradient are of another. What is not known is NaN.
    """
    totals = sums.tolist()
    # Of a tensor without elements every share is 0.
    elements = int(totals[ELEMENTS])
    parts = {}
    for number, part in enumerate(PARTS):
        at = number * VALUES
        # A maximum over ranks may lose a NaN, a sum does not.
        square = totals[at + SQUARES]
        norm, most = (nan, nan) if isnan(square) else (sqrt(square), float(largest[number]))
        if part == "gradient" and gone:
            parts[part] = PartStatistics(result.norms.get(name, nan), nan, nan)
            continue
        if part == "gradient":
            before = result.norms.get(name, norm)
            most, norm = most * (before / norm if norm > 0 else 1.0), before
        parts[part] = PartStatistics(norm, most, totals[at + ZEROS] / max(elements, 1))
    return TensorStatistics(name, elements, parts)
