"""The global gradient norm, each parameter counted once, and the sums that go with it: one exchange a step.

Every rank adds the square sum of its own rows of each piece into a fp64 table with a line a global tensor. The table is
summed over the ranks of a stage, then over stages, and added up in the order of the forward pass. Other stages contribute
exact zeros, so the result does not depend on the pipeline degree in a single bit; data- and tensor-parallel ranks each
hold different rows, and a tensor that all tensor-parallel ranks hold is counted by the first of them.

The loss, the count of ranks asked to stop and the finite check ride in the same table: every rank decides from the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor

from k2train.parallel.collectives import all_reduce
from k2train.parallel.gradients import SlotTable
from k2train.parallel.grid import Axis


@dataclass(frozen=True)
class StepSums:
    """What all ranks agree on after a step."""

    loss: float
    """Mean over all targets of the global batch (nats a token)."""
    grad_norm: float
    """Before clipping."""
    norms: Mapping[str, float]
    """Norm of each global tensor's gradient."""
    flags: tuple[float, ...]
    """Sums over all ranks of what each put in."""

    @property
    def finite(self) -> bool:
        return isfinite(self.loss) and isfinite(self.grad_norm)


def square_sums(table: SlotTable, line: Tensor, names: Sequence[str], tp: Axis) -> Tensor:
    """Square sum of this rank's rows of each global tensor, fp64 [len(names)]; 0 where it holds none or another counts it
    (NaN where a copy that another counts is not finite here)."""
    index = {name: i for i, name in enumerate(names)}
    sums = torch.zeros(len(names), dtype=torch.float64, device=line.device)
    for slot in table.slots:
        rows = table.local(line, slot)
        if rows.numel():
            square = torch.linalg.vector_norm(rows, dtype=torch.float64).square()
            counted = slot.piece.dim is not None or tp.rank == 0
            # Times 0 and not skipped: a replica that is not finite must still stop the step, and 0 * inf is NaN.
            sums[index[slot.piece.name]] = square if counted else square * 0.0
    return sums


def agree(sums: Tensor, names: Sequence[str], loss: Tensor, flags: Sequence[float], stage: Axis, pp: Axis) -> StepSums:
    """Exchange square sums, this rank's part of the loss (already divided; 0 where another rank counts it) and flags."""
    tail = torch.tensor([0.0, *flags], dtype=torch.float64, device=sums.device)
    tail[0] = loss.double()
    table = torch.cat((sums, tail))
    all_reduce(table, stage)
    all_reduce(table, pp)
    values = table.tolist()
    squares = values[: len(names)]
    total = 0.0
    for value in squares:
        total += value
    norms = {name: sqrt(value) if value >= 0 else float("nan") for name, value in zip(names, squares, strict=True)}
    norm = sqrt(total) if total >= 0 else float("nan")
    return StepSums(values[len(names)], norm, norms, tuple(values[len(names) + 1 :]))


def clip_scale(grad_norm: float, clip_norm: float | None) -> float:
    """Factor that brings the norm down to `clip_norm`, 1 below it (torch.nn.utils.clip_grad_norm_'s rule)."""
    if clip_norm is None:
        return 1.0
    return min(1.0, clip_norm / (grad_norm + 1e-6))
