"""RMSNorm in Triton, alone or with the residual sum before it, forward and backward.

- Forward: one program a row. With a second operand it writes the sum, rounded, and its norm: four
  passes over the activations instead of five.
- Backward: the gradient that comes along the residual stream is added in the same pass: four passes
  instead of six.
- The weight's gradient is summed over blocks of rows, one program each, then over the blocks. No
  atomics, and the blocks depend on the number of rows only.

Formula: y = x r w with r = (mean(x^2) + eps)^-1/2; dx = r (w dy) - x r^3 mean(x w dy), dw = sum of
x r dy. Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.

Alternatives considered:
- Summing the weight's gradient with atomics: another order, and other bits, in every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

WEIGHT_BLOCKS = 512
"""Most blocks of rows of a weight's gradient: enough programs for a device, few partial sums."""
LARGEST = 65536
"""Most features: a row is held in registers."""


@triton.jit
def _forward_kernel(
    x, delta, weight, total, y, scale, features, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    at = row * features + columns

    value = tl.load(x + at, mask=inside, other=0.0)
    if HAS_DELTA:
        other = tl.load(delta + at, mask=inside, other=0.0)
        # Rounded as a sum of its own would be, and normed as rounded.
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
        tl.store(total + at, value, mask=inside)

    wide = value.to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / features + eps)
    tl.store(scale + row, factor)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (wide * factor * w).to(value.dtype), mask=inside)


@triton.jit
def _backward_kernel(
    dy,
    dtotal,
    x,
    weight,
    scale,
    dx,
    partial,
    rows,
    rows_a_block,
    features,
    HAS_DTOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)

    first = block * rows_a_block
    for row in range(first, tl.minimum(first + rows_a_block, rows)):
        at = row * features + columns
        factor = tl.load(scale + row)
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        dw += gradient * normed

        pulled = gradient * w
        mean = tl.sum(pulled * normed, axis=0) / features
        result = (pulled - normed * mean) * factor
        if HAS_DTOTAL:
            result += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)

    tl.store(partial + block * features + columns, dw, mask=inside)


def _width(features: int) -> dict[str, Any]:
    """Launch options for rows of `features`: a power of two, about 16 values a thread."""
    block = triton.next_power_of_2(features)
    return {
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 512)),
        "enable_fp_fusion": False,
    }


def forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of x [..., h], or of x + delta: (sum, norm, factors fp32 [rows]).

    Without `delta` the sum is `x`, its memory included.
    """
    features = x.shape[-1]
    assert features <= LARGEST, f"a row of {features} values is not held in registers"
    x = x.contiguous()
    total, y = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    rows = x.numel() // features
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)

    if rows:
        _forward_kernel[(rows,)](
            x,
            x if delta is None else delta.contiguous(),
            weight,
            total,
            y,
            scale,
            features,
            eps,
            HAS_DELTA=delta is not None,
            **_width(features),
        )
    return total, y, scale


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients (of what was normed, of the weight), for `dy` and the gradient `dtotal` of x."""
    features, rows = x.shape[-1], scale.numel()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not rows:
        return dx, torch.zeros_like(weight)

    rows_a_block = -(-rows // WEIGHT_BLOCKS)
    blocks = -(-rows // rows_a_block)
    partial = torch.empty(blocks, features, dtype=torch.float32, device=x.device)
    dy = dy.contiguous()
    _backward_kernel[(blocks,)](
        dy,
        dy if dtotal is None else dtotal.contiguous(),
        x,
        weight,
        scale,
        dx,
        partial,
        rows,
        rows_a_block,
        features,
        HAS_DTOTAL=dtotal is not None,
        **_width(features),
    )
    return dx, partial.sum(0).to(weight.dtype)


class _Norm(torch.autograd.Function):
    """Keeps the input and one factor a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, y, scale = forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *backward(dy, None, *ctx.saved_tensors), None


class _AddNorm(torch.autograd.Function):
    """Sum and norm of it; keeps the sum and one factor a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, y, scale = forward(x, delta, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        ctx.has_delta = delta is not None
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dtotal: Tensor | None, dy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        total, weight, scale = ctx.saved_tensors
        dx, dweight = dtotal, None
        if dy is not None:
            dx, dweight = backward(dy, dtotal, total, weight, scale)
        return dx, dx if ctx.has_delta else None, dweight, None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [..., h] with weight [h], computed in fp32, in the dtype of x."""
    return _Norm.apply(x, weight, eps)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sum x + delta [..., h], rounded, and its RMSNorm with weight [h].

    Without `delta` the sum is x. Whoever adds to the residual stream uses the returned sum: its
    gradient joins that of the norm in one pass.
    """
    return _AddNorm.apply(x, delta, weight, eps)
