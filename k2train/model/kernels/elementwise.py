"""Fused RMSNorm, rotary positions and SwiGLU: autograd functions with few memory passes.

- At training sizes these are memory-bound: what counts is how often a tensor is read and written.
- The functions keep their inputs and one factor per position, never a wide copy. They compute in
  fp32 (float64 stays float64), round once, and write the gradients of one product's outputs into
  one tensor.
- Forward and backward of [256, 4, 256] on one busy core, in us, with torch's operators -> here:
  norm 800 -> 430 (bf16 870 -> 620), rotary with the split 1350 -> 1010 (bf16 1380 -> 940). The
  SwiGLU of width 688 gains no time (1500 -> 1650; bf16 1550 -> 2000) but keeps a third less: not
  keeping silu(gate) costs a second exponential.

Alternatives considered:
- Kernels of our own in C++ or Triton. Where a compiler is available, `torch.compile` of the
  references makes them. Where none is, nothing may need one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2train.parallel.grad_accumulation import accumulated

Norm = Callable[[Tensor, Tensor, float], Tensor]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the computation for values of `dtype`: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm written out: x / sqrt(mean(x^2) + eps) * weight.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    wide = x.to(wide_dtype(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm by torch's own op, accumulated in fp32: one kernel on CUDA, several on a CPU."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor, or return it as it is: without an operator where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm y = x r w with r = (mean(x^2) + eps)^-1/2, of [..., h].

    Returns y and the wide r [..., 1], which the backward needs.
    """
    wide = as_dtype(x, wide_dtype(x.dtype)).contiguous()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    scale.mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    y = torch.mul(wide, scale).mul_(as_dtype(weight, wide.dtype))
    return as_dtype(y, x.dtype), scale


def norm_backward(dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `norm_forward`, whose r is `scale`; dx is new memory.

    dx = r (w dy) - x r^3 mean(x w dy), dw = sum of x r dy.
    """
    features, wide = x.shape[-1], scale.dtype
    gradient, value = as_dtype(dy, wide).contiguous(), as_dtype(x, wide).contiguous()
    factor = as_dtype(weight, wide)

    # Both sums over the product are products with a vector: one read each, no temporary.
    product = torch.mul(gradient, value)
    flat, rows = product.flatten(0, -2), scale.view(-1)
    dweight = torch.mv(flat.t(), rows)

    pull = torch.mv(flat, factor).mul_(rows).mul_(rows).mul_(rows).mul_(-1.0 / features)
    dx = torch.mul(gradient, factor, out=product).mul_(scale)
    dx.addcmul_(value, pull.view_as(scale))
    return as_dtype(dx, x.dtype), as_dtype(dweight, weight.dtype)


class _Norm(torch.autograd.Function):
    """The weight's gradient goes to its accumulator, where it has one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = norm_forward(x, weight, eps)
        ctx.weight = weight
        ctx.save_for_backward(x, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scale = ctx.saved_tensors
        dx, dweight = norm_backward(dy, x, scale, ctx.weight)
        return dx, accumulated(ctx.weight, dweight) if ctx.needs_input_grad[1] else None, None


def fused_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [..., h] with weight [h], keeping x and one factor per position.

    On CUDA torch's own kernel, which is fused already.
    """
    if x.device.type == "cuda":
        return torch_norm(x, weight, eps)
    return _Norm.apply(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """Rotate-half [s, b, n, d] by tables [>= s, 1, 1, d]; `sign` -1 rotates back.

    The result is wide and new.
    """
    return _rotate(x, *cut_tables(cos, sin, x.shape[0]), sign)


def cut_tables(cos: Tensor, sin: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut the tables to cos [s, 1, 1, d] and sin [s, 1, 1, d/2], whose halves are equal."""
    if cos.shape[0] != length:
        cos, sin = cos.narrow(0, 0, length), sin.narrow(0, 0, length)
    return cos, sin.narrow(-1, 0, sin.shape[-1] // 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor | None = None) -> Tensor:
    """`rotate` by tables that are cut, in `out` where given (of the dtype of the result)."""
    wide = as_dtype(x, wide_dtype(x.dtype))
    # Two halves in place, instead of a concatenated rotated copy.
    rotated = torch.mul(wide, cos, out=out)
    first, second = wide.chunk(2, dim=-1)
    into_first, into_second = rotated.chunk(2, dim=-1)
    into_first.addcmul_(second, sin, value=-sign)
    into_second.addcmul_(first, sin, value=sign)
    return rotated


def reference_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions written out, rotate-half convention: [s, b, n, d].

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2.
    """
    length = x.shape[0]
    wide = x.to(wide_dtype(x.dtype))
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (wide * cos[:length] + rotated * sin[:length]).to(x.dtype)


def _heads(packed: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Split [s, b, (n + 2 n_kv) d] into query, key and value, each a view [s, b, heads, d]."""
    split = packed.view(*packed.shape[:2], heads + 2 * kv_heads, -1)
    # Not `split`, which is a function in Python around this one.
    return split.split_with_sizes((heads, kv_heads, kv_heads), dim=2)


def _to_attention(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


def reference_split(
    packed: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split [s, b, (n + 2 n_kv) d] into q [b, n, s, d], k and v [b, n_kv, s, d].

    q and k are rotated. Each result has memory of its own.
    """
    q, k, v = _heads(packed, heads, kv_heads)
    q, k = reference_rotate(q, cos, sin), reference_rotate(k, cos, sin)
    return (
        _to_attention(q),
        _to_attention(k),
        _to_attention(v.clone(memory_format=torch.contiguous_format)),
    )


def split_forward(
    packed: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split and rotate like `reference_split`, by tables that are cut (`cut_tables`)."""
    q, k, v = _heads(packed, heads, kv_heads)
    q, k = (as_dtype(_rotate(part, cos, sin, 1.0), packed.dtype) for part in (q, k))
    # Own memory for v: a view would keep the whole packed tensor until the backward pass.
    return (
        _to_attention(q),
        _to_attention(k),
        _to_attention(v.clone(memory_format=torch.contiguous_format)),
    )


def split_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of `split_forward` by the same tables: rotates the other way into one tensor."""
    (b, heads, s, d), kv_heads = dq.shape, dk.shape[1]
    dpacked = dq.new_empty((s, b, (heads + 2 * kv_heads) * d))
    into_q, into_k, into_v = _heads(dpacked, heads, kv_heads)
    is_wide = dpacked.dtype == wide_dtype(dpacked.dtype)
    for into, gradient in ((into_q, dq), (into_k, dk)):
        back = gradient.permute(2, 0, 1, 3)
        if is_wide:
            _rotate(back, cos, sin, -1.0, out=into)
        else:
            into.copy_(_rotate(back, cos, sin, -1.0))
    into_v.copy_(dv.permute(2, 0, 1, 3))
    return dpacked


class _Split(torch.autograd.Function):
    """Keeps nothing but the tables."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.tables = cos, sin = cut_tables(cos, sin, packed.shape[0])
        return split_forward(packed, cos, sin, heads, kv_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return split_backward(dq, dk, dv, *ctx.tables), None, None, None, None


def fused_split(
    packed: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split and rotate like `reference_split`, in fewer passes."""
    return _Split.apply(packed, cos, sin, heads, kv_heads)


def reference_swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU written out: silu(gate) up, [..., 2f] -> [..., f] (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """SwiGLU of [..., 2f] -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `swiglu_forward`, as one tensor."""
    gate, up = gate_up.chunk(2, dim=-1)
    gradient = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    dgate, dup = gradient.chunk(2, dim=-1)

    passing = F.silu(gate)
    torch.mul(dy, passing, out=dup)
    # silu(gate) is used up: its memory takes the gradient.
    torch.mul(dy, up, out=passing)
    torch.ops.aten.silu_backward.grad_input(passing, gate, grad_input=dgate)
    return gradient


class _SwiGlu(torch.autograd.Function):
    """Keeps the input only. Computing silu again costs less than writing and reading it."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return swiglu_backward(dy, *ctx.saved_tensors)


def fused_swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU like `reference_swiglu`, keeping the input only, with one gradient tensor."""
    return _SwiGlu.apply(gate_up)
