"""Vocabulary-parallel cross entropy of given logits, written out pass by pass.

- The reference for `k2train.parallel.fused_cross_entropy`, which keeps no logits. Both have the
  same labels, and the same vocabulary shards.
- A label outside the vocabulary is refused. With plain masking no rank would own it, its logit
  would count as zero, and a corrupt file would *lower* the loss. A CPU raises; an accelerator makes
  the loss NaN, which the finite check refuses.

Source: Shoeybi et al. 2019 (arXiv:1909.08053) section 3, "parallel cross entropy".
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.errors import DataError
from k2train.parallel.collectives import all_reduce
from k2train.parallel.grid import Axis

IGNORE = -100
"""Label of a position without a target, the last of a sample.

Loss and gradient are exactly 0 there.
"""


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, start: int, vocab_size: int, tp: Axis
    ) -> Tensor:
        x = logits.float()
        ctx.width = x.shape[-1]
        stop = start + ctx.width

        if not ctx.width:
            # A small vocabulary can leave the last ranks without ids: one with probability 0 helps.
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


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_start: int, vocab_size: int, tp: Axis
) -> Tensor:
    """Reference loss per position: logits [s, b, v/tp], labels [s, b] -> [s, b] in fp32.

    Collective.

    `vocab_start` is this rank's first id. Positions labelled IGNORE give 0. Raises DataError for a
    label outside 0..vocab_size-1 (on a CPU; see the module docstring).
    """
    refuse_bad_labels(labels, vocab_size)
    return _VocabCrossEntropy.apply(logits, labels, vocab_start, vocab_size, tp)


def refuse_bad_labels(labels: Tensor, vocab_size: int) -> bool:
    """Raise DataError for a label outside 0..vocab_size-1 that is not IGNORE; on a CPU only.

    Returns whether the labels were looked at.
    """
    if labels.device.type != "cpu":
        return False
    bad = (labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))
    if bool(bad.any()):
        position, row = (int(i) for i in bad.nonzero()[0])
        raise DataError(
            f"label id {int(labels[position, row])} at row {row}, position {position} of a "
            f"micro-batch is outside the vocabulary (model.vocab_size is {vocab_size})"
        )
    return True


@dataclass(frozen=True)
class VocabShard:
    """Vocabulary ids of this rank's rows of the head: `width` from `start`, of `size` in all."""

    start: int
    width: int
    size: int
    tp: Axis
