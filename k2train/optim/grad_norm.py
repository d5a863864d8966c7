"""Global gradient norm with clipping, loss, flags and finite check in one exchange per step.

- Every rank adds the square sum of its rows of each slice into an fp64 vector with one entry per
  global tensor. The vector is summed over the ranks of a stage, then over stages, and added up in
  an order that no layout changes (`ordered_sum`).
- Other stages contribute exact zeros, so no bit of the result depends on the pipeline degree. Data-
  and tensor-parallel ranks each hold different rows. A tensor that all tensor-parallel ranks hold
  is counted by the first.
- Squares are taken and added in fp64 for tensors of any size and on any device. No finite fp32
  gradient overflows there, none vanishes, and every layout decides alike.
- The loss, the number of ranks asked to stop and the finite check travel in the same vector. Every
  rank decides from the same bytes, on its device. The host reads the outcome when the whole step is
  queued.

Alternatives considered:
- A host that reads the norm first: the device would idle meanwhile.
- Squares of large tensors in fp32, block by block: twice as fast for tensors of many million
  elements, a share of a step that cannot be measured. It overflows above 1.8e19 and vanishes below
  1e-23, so whether a step is skipped would depend on the size of a rank's part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from k2train.parallel.collectives import all_reduce
from k2train.parallel.grid import Axis
from k2train.parallel.shard_layout import ShardLayout

PIECE = 1 << 18
"""Elements that a CPU converts to fp64 at a time: 2 MiB, which stay in its cache."""
LARGEST_NORM = 2.0**63
"""Largest norm after clipping that AdamW can use.

Its second moment is the square of a gradient in fp32. Above 2**64 that is infinite, and a weight
whose second moment is infinite never moves again.
"""


@dataclass(frozen=True)
class StepSums:
    """Sums all ranks agree on after a step."""

    loss: float
    """Mean over all targets of the global batch (nats per token)."""
    grad_norm: float
    """Global norm before clipping."""
    norms: Mapping[str, float]
    """Norm of each global tensor's gradient."""
    flags: tuple[float, ...]
    """Sums over all ranks of each rank's flags."""
    applied: bool
    """Whether the update was applied, as the device decided."""


@dataclass(frozen=True)
class StepDecision:
    """Decision about a step, on the device: what the optimizer needs, and `read` for the host."""

    names: Sequence[str]
    totals: Tensor
    """fp64 [names + loss + flags]."""
    grad_norm: Tensor
    """fp64 scalar."""
    divisor: Tensor
    """fp32 scalar that the gradient is divided by to be clipped; 1 where it need not be."""
    skip: Tensor
    """fp32 scalar: 1 where the update must not be applied, else 0."""

    def read(self) -> StepSums:
        """Read the sums on the host, waiting for the device once."""
        decided = torch.stack((self.grad_norm, self.skip.double()))
        *values, norm, skip = torch.cat((self.totals, decided)).tolist()
        n = len(self.names)
        norms = {
            name: sqrt(value) if value >= 0 else float("nan")
            for name, value in zip(self.names, values[:n], strict=True)
        }
        return StepSums(values[n], norm, norms, tuple(values[n + 1 :]), applied=not skip)


class SquareSums:
    """Square sums of this rank's rows of each global tensor of `names`."""

    def __init__(
        self, shard_layout: ShardLayout, names: Sequence[str], tp: Axis, device: torch.device
    ):
        index_of = {name: i for i, name in enumerate(names)}
        self.shard_layout, self.names = shard_layout, names
        self._held = [
            slot
            for slot in shard_layout.slots
            if slot.rows(shard_layout.dp)[1] > slot.rows(shard_layout.dp)[0] and slot.width
        ]
        self._indices = torch.tensor(
            [index_of[slot.param_slice.name] for slot in self._held],
            dtype=torch.int64,
            device=device,
        )

        # Multiplied by 0, not left out: a replica that is not finite must still stop the step, and
        # 0 * inf is NaN.
        counted = [float(slot.param_slice.dim is not None or tp.rank == 0) for slot in self._held]
        self._counted = torch.tensor(counted, dtype=torch.float64, device=device)

        self._shard: Tensor | None = None
        self._rows: list[Tensor] = []
        self._pieces: list[list[tuple[Tensor, Tensor]]] = []

    def __call__(self, shard: Tensor) -> Tensor:
        """Return fp64 [names] from a flat shard [elements].

        0 where this rank holds nothing or another rank counts the tensor. NaN where a copy that
        another counts is not finite here.
        """
        sums = torch.zeros(len(self.names), dtype=torch.float64, device=shard.device)
        if self._held:
            if shard is not self._shard:
                # The gradient buffer returns the same shard in every step: look its parts up once.
                self._shard = shard
                self._rows = [self.shard_layout.local(shard, slot).view(-1) for slot in self._held]
                self._pieces = _pieces(self._rows) if shard.device.type == "cpu" else []

            squares = (
                torch.stack([_square(part) for part in self._pieces])
                if self._pieces
                else _squares(self._rows)
            )

            sums.index_copy_(0, self._indices, squares * self._counted)

        return sums


def _pieces(parts: Sequence[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """Cut each part [n] into pieces, and pair each with the fp64 memory that all of them share.

    Cut from the begin of each part: its rounding does not depend on what else the rank holds.
    """
    longest = max(part.numel() for part in parts)
    double = torch.empty(min(PIECE, longest), dtype=torch.float64)
    return [[(piece, double[: piece.numel()]) for piece in part.split(PIECE)] for part in parts]


def _square(pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Square sum of one part on a CPU, an fp64 scalar.

    torch's norm with dtype=float64 takes five times as long: it converts the whole part first.
    """
    sums = [double.copy_(piece).dot(double) for piece, double in pieces]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _squares(rows: Sequence[Tensor]) -> Tensor:
    """Square sums [len(rows)] on a device, added in fp64 by a few kernels for all."""
    return torch.stack(torch._foreach_norm(list(rows), 2.0, dtype=torch.float64)).square()


def decide_step(
    sums: Tensor,
    names: Sequence[str],
    loss: Tensor,
    flags: Sequence[float],
    stage: Axis,
    pp: Axis,
    clip_norm: float | None = None,
) -> StepDecision:
    """All-reduce square sums, loss and flags; decide clipping and skipping on the device.

    Collective.

    - `loss` is this rank's part (already divided; 0 where another rank counts it).
    - The gradient is divided by max(1, (norm + 1e-6) / clip_norm), torch.nn.utils.clip_grad_norm_'s
      rule.
    - A step is skipped if loss or norm are not finite, or if the norm after clipping is above
      LARGEST_NORM, or too large to be clipped by an fp32 divisor.
    """
    totals = share(torch.cat((sums, loss.detach().double().view(1))), flags, stage, pp)
    return decision_of(totals, names, clip_norm)


def share(sums: Tensor, flags: Sequence[float], stage: Axis, pp: Axis) -> Tensor:
    """Return fp64 `sums` [n] and flags, [n + flags], summed over all ranks. Collective."""
    totals = torch.cat((sums, sums.new_zeros(len(flags))))

    # A flag that is zero copies nothing from the host; the others are a few small kernels.
    for index, flag in enumerate(flags):
        if flag:
            totals[len(sums) + index].fill_(flag)

    # Over the ranks of a stage, then over stages: other stages add exact zeros.
    all_reduce(totals, stage)
    all_reduce(totals, pp)
    return totals


def decision_of(totals: Tensor, names: Sequence[str], clip_norm: float | None) -> StepDecision:
    """Decide from sums over all ranks: fp64 [names + loss + flags], squares of norms first."""
    norm = ordered_sum(totals[: len(names)]).sqrt()
    divisor = (
        torch.ones_like(norm) if clip_norm is None else ((norm + 1e-6) / clip_norm).clamp(min=1.0)
    ).float()

    # Comparisons with NaN are false, and a divisor of infinity turns any gradient into 0.
    usable = (norm / divisor <= LARGEST_NORM) & torch.isfinite(divisor)
    skip = (~(usable & torch.isfinite(totals[len(names)]))).float()
    return StepDecision(names, totals, norm, divisor, skip)


def ordered_sum(values: Tensor) -> Tensor:
    """Sum of fp64 [n], a scalar, by additions in an order that every rank has and no run changes.

    On a CPU that is the order of the forward pass. On a device it follows from n: cumsum has no
    deterministic form there, and ranks that decide differently would part for good.
    """
    return values.cumsum(0)[-1] if values.device.type == "cpu" else values.sum()
