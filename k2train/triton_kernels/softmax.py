"""Softmax of a strip of logits in place, with what the loss needs of each row, in Triton.

- One program a row. A first pass finds maximum and sum together, a second writes probabilities over
  the logits: 6 bytes a bf16 logit. torch's operators need an fp32 copy of the strip and 28 bytes.
- bf16 logits are widened in registers, so no fp32 copy exists.
- The label's logit is picked from the first pass, before anything is written.

Source of the running maximum and sum: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 8192
"""Most columns held at a time."""


@triton.jit
def _softmax_kernel(logits, stride, index, stats, rows, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    label = tl.load(index + row)
    # Numbers of the arguments' kind in every round of the loop.
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    label_logit = tl.full((), 0.0, tl.float32)

    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(line + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        label_logit += tl.sum(tl.where(columns == label, x, 0.0), axis=0)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        # Nothing but -inf so far: there is no number to subtract.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(x - shift), axis=0)
        peak = higher

    shift = tl.where(peak == float("-inf"), 0.0, peak)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(line + columns, mask=inside, other=float("-inf")).to(tl.float32)
        probability = tl.exp(x - shift) / total
        tl.store(line + columns, probability.to(logits.dtype.element_ty), mask=inside)

    tl.store(stats + row, peak)
    tl.store(stats + rows + row, tl.log(total))
    tl.store(stats + 2 * rows + row, label_logit)
    tl.store(stats + 3 * rows + row, tl.exp(label_logit - shift) / total)


def softmax_(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits [r, width] into the softmax over these columns, in place.

    `index` [r, 1] is the label's column. Returns fp32 [3, r]: the maximum, the logarithm of the sum
    of exponentials below it, the label's logit. And the label's probability, fp32 [r].
    """
    rows, width = logits.shape
    stats = torch.zeros(4, rows, dtype=torch.float32, device=logits.device)
    if not width:
        stats[0] = float("-inf")
        return stats[:3], stats[3]

    assert logits.stride(1) == 1, "the columns of a strip lie one after another"
    block = min(LARGEST_BLOCK, triton.next_power_of_2(width))
    if rows:
        _softmax_kernel[(rows,)](
            logits,
            logits.stride(0),
            index.contiguous(),
            stats,
            rows,
            width,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
            enable_fp_fusion=False,
        )
    return stats[:3], stats[3]
