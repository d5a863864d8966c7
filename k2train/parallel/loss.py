"""Cross entropy over logits whose vocabulary is split over tensor-parallel ranks; the whole row is never gathered.

Three reductions of [s, b] values: the maximum, the sum of exponentials, the label's logit (the last two in one call).
A label outside the vocabulary is refused: with plain masking it would be nobody's, its logit would count as zero, and a
corrupt file would *lower* the loss. On CPU it raises; on an accelerator it makes the loss NaN, which the finite check refuses.

Source: Shoeybi et al. 2019 (arXiv:1909.08053) section 3, "parallel cross entropy".
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.errors import DataError
from k2train.parallel.collectives import all_reduce
from k2train.parallel.grid import Axis

IGNORE = -100
"""A position without a label: the last of a sample. Loss and gradient are exactly 0 there."""


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, start: int, vocab_size: int, tp: Axis) -> Tensor:
        x = logits.float()
        ctx.width = x.shape[-1]
        stop = start + ctx.width
        if not ctx.width:
            # A small vocabulary can leave the last ranks no id at all: one that is never likely keeps one path.
            x = x.new_full((*x.shape[:-1], 1), float("-inf"))
        peak = all_reduce(x.amax(dim=-1), tp, dist.ReduceOp.MAX)
        x = x - peak.unsqueeze(-1)
        mine = (labels >= start) & (labels < stop)
        index = torch.where(mine, labels - start, 0).unsqueeze(-1)
        label_logit = torch.where(mine, x.gather(-1, index).squeeze(-1), 0.0)
        x = x.exp_()
        sums = all_reduce(torch.stack((x.sum(dim=-1), label_logit)), tp)
        counted = labels != IGNORE
        loss = (sums[0].log() - sums[1]) * counted
        bad = counted & ((labels < 0) | (labels >= vocab_size))
        loss = loss.masked_fill(bad, float("nan"))
        ctx.save_for_backward(x.div_(sums[0].unsqueeze(-1)), index, mine, counted)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        softmax, index, mine, counted = ctx.saved_tensors
        gradient = softmax.scatter_add(-1, index, -mine.unsqueeze(-1).to(softmax.dtype))
        gradient *= (grad * counted).unsqueeze(-1)
        return gradient[..., : ctx.width].to(ctx.dtype), None, None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, vocab_start: int, vocab_size: int, tp: Axis) -> Tensor:
    """Loss of each position: logits [s, b, v/tp] (this rank's ids from `vocab_start`), labels [s, b] -> [s, b] in fp32.

    Positions labelled IGNORE give 0. Raises DataError for a label outside 0..vocab_size-1 (CPU; see the module docstring).
    """
    if labels.device.type == "cpu":
        bad = (labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))
        if bool(bad.any()):
            position, row = (int(i) for i in bad.nonzero()[0])
            raise DataError(
                f"label id {int(labels[position, row])} at row {row}, position {position} of a micro-batch is outside the vocabulary (model.vocab_size is {vocab_size})"
            )
    return _VocabCrossEntropy.apply(logits, labels, vocab_start, vocab_size, tp)
