"""Gradient norm and loss that no data-parallel degree or micro-batch size changes by a bit.

- A row's squares are exact in fp64. They are added by halves, in a tree that the row's width alone
  decides. A row is never split over data-parallel ranks.
- The rows' sums are added exactly. Each is cut at fixed bits into up to three parts of 32 bits, and
  each part is added to its bin. Bins are integers below 2**53, so every order of fp64 additions
  gives the same bits, also that of a collective.
- The loss of each unit of sequences travels in a place of its own, zero on the other ranks. Every
  rank adds them in the order of the sequences.
- All of it is in the one exchange of a step: 20 bins for each global tensor, and one number for
  each unit.

Alternatives considered:
- torch's sums along a row: their order may depend on how many rows there are, and on threads.
- Sums of rows gathered in order: millions of numbers for a large model.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from k2train.optim.grad_norm import PIECE, StepDecision, decision_of, ordered_sum, share
from k2train.parallel.grid import Axis
from k2train.parallel.shard_layout import ShardLayout

BIN_BITS = 32
LOWEST = -320
"""Exponent of bin 0. Below 2**-298 lies no bit of a square of an fp32 number."""
BINS = 20
"""Bins reach 2**320. Squares of fp32 numbers are below 2**256."""
LARGEST_ROWS = 2 ** (53 - BIN_BITS)
"""Rows of a tensor whose parts of 32 bits add up exactly."""
PARTS = 3
"""Bins that the 53 bits of an fp64 number can touch."""


def square_sums_of_rows(rows: Tensor) -> Tensor:
    """Return the square sum of each row, fp64 [n], of fp32 [n, width]: the same bits for any n."""
    sums = torch.empty(rows.shape[0], dtype=torch.float64, device=rows.device)
    at_a_time = max(1, PIECE // max(1, rows.shape[1]))
    for part, into in zip(rows.split(at_a_time), sums.split(at_a_time), strict=True):
        into.copy_(_add_halves(part.double().square_()))
    return sums


def _add_halves(values: Tensor) -> Tensor:
    """Add the columns of [n, width], which is used up: the second half to the first, and again."""
    width = values.shape[1]
    while width > 1:
        half = (width + 1) // 2
        values[:, : width - half].add_(values[:, half:width])
        width = half
    return values[:, 0]


@cache
def _scales(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the unit of each bin and its inverse, fp64 [BINS].

    From a table: a device's own power function may round. Made once, since a copy to a device
    waits for it.
    """
    scales = [2.0 ** (number * BIN_BITS + LOWEST) for number in range(BINS)]
    units = torch.tensor(scales, dtype=torch.float64, device=device)
    return units, torch.tensor([1.0 / one for one in scales], dtype=torch.float64, device=device)


def add_exactly(bins: Tensor, values: Tensor, index: Tensor) -> None:
    """Add fp64 values [n], not negative, to the bins of their tensors [tensors, BINS].

    `index` [n] is each value's tensor. A value that is not finite makes a bin of it NaN.
    """
    _, exponent = torch.frexp(values)
    # The bin of the leading bit. What is below bin 0 is zero by then.
    top = torch.div(exponent.long() - 1 - LOWEST, BIN_BITS, rounding_mode="floor")
    top = top.clamp(0, BINS - 1)
    scale, inverse = _scales(values.device)
    flat, left = bins.view(-1), values
    for part in range(PARTS):
        bin_of = (top - part).clamp(min=0)
        units = (left * inverse[bin_of]).trunc()
        left = left - units * scale[bin_of]
        flat.index_add_(0, index * BINS + bin_of, units)


def value_of(bins: Tensor) -> Tensor:
    """Return the sums [tensors] of bins [tensors, BINS], the highest first."""
    total = bins.new_zeros(bins.shape[0])
    for number in reversed(range(BINS)):
        total = total + bins[:, number] * 2.0 ** (number * BIN_BITS + LOWEST)
    return total


class ExactSquareSums:
    """Square sums of this rank's rows of each global tensor of `names`, as bins."""

    def __init__(self, shard_layout: ShardLayout, names: Sequence[str], device: torch.device):
        index_of = {name: number for number, name in enumerate(names)}
        self.shard_layout, self.names = shard_layout, names
        self._held = [
            slot
            for slot in shard_layout.slots
            if slot.rows(shard_layout.dp)[1] > slot.rows(shard_layout.dp)[0] and slot.width
        ]
        for slot in shard_layout.slots:
            rows = slot.param_slice.global_shape[0]
            assert rows <= LARGEST_ROWS, f"{slot.param_slice.name} has {rows} rows"

        _scales(device)
        counts = [rows[1] - rows[0] for rows in (slot.rows(shard_layout.dp) for slot in self._held)]
        tensors = [index_of[slot.param_slice.name] for slot in self._held]
        self._index = torch.repeat_interleave(
            *(torch.tensor(n, dtype=torch.int64, device=device) for n in (tensors, counts))
        )

    def __call__(self, shard: Tensor) -> Tensor:
        """Return bins, fp64 [names, BINS], from a flat shard [elements]."""
        bins = torch.zeros(len(self.names), BINS, dtype=torch.float64, device=shard.device)
        if self._held:
            rows = [
                square_sums_of_rows(self.shard_layout.local(shard, slot).view(-1, slot.width))
                for slot in self._held
            ]
            add_exactly(bins, torch.cat(rows), self._index)
        return bins


def decide_exact_step(
    bins: Tensor,
    names: Sequence[str],
    losses: Tensor,
    flags: Sequence[float],
    stage: Axis,
    pp: Axis,
    clip_norm: float | None = None,
) -> StepDecision:
    """All-reduce bins [names, BINS], losses of all units [units] and flags; decide as
    `decide_step` does. Collective.

    A rank's losses are already divided, and zero in the places of other ranks.
    """
    totals = share(torch.cat((bins.flatten(), losses.detach().double())), flags, stage, pp)
    summed, units, shared = totals.split((bins.numel(), losses.numel(), len(flags)))
    squares = value_of(summed.view_as(bins))
    return decision_of(torch.cat((squares, ordered_sum(units).view(1), shared)), names, clip_norm)
