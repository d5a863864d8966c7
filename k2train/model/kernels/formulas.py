"""Forward and backward formulas of norm, rotary split and SwiGLU, eager or compiled.

- A layer that is one autograd function (`k2train.model.layer_function`) calls these, below
  autograd.
- `FUSED` are the fused kernels of a CPU, in torch's operators.
- Compiled, each formula is one graph that writes each result once. The sums with the residual
  stream belong to the norm beside them, so that no pass is made for them.
- Compiled formulas add in another order than `FUSED` does, and so differ by rounding. They repeat
  to the bit.

Alternatives considered:
- Compiled parts under autograd, one by one: each call then passes through autograd in Python twice,
  and the residual sums stay passes of their own.
- Compiled whole layers: their products communicate, and add weight gradients as side effects.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k2train.model.kernels.elementwise import (
    norm_backward,
    norm_forward,
    split_backward,
    split_forward,
    swiglu_backward,
    swiglu_forward,
    wide_dtype,
)

COMPILED_VERSION = 2
"""Version of the code that `kernels.compile` compiles on a CPU: these formulas, and the references
of `elementwise`. It is in the kernels line, because other code rounds otherwise. 1, which the line
does not name: all parts under autograd."""


@dataclass(frozen=True)
class Formulas:
    """Both directions of the parts of a layer between its products. Rows are [n, h]."""

    norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """x, weight, eps -> y, and the scale that the backward needs."""
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    """x (used up), residual, weight, eps -> the sum of the first two; its y and scale."""
    norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """dy, x, scale, weight, the residual's gradient -> gradients of x (both), of the weight."""
    split: Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]
    split_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor], Tensor]


def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.add_(residual)
    return total, *norm_forward(total, weight, eps)


def _norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dweight = norm_backward(dy, x, scale, weight)
    return dx.add_(residual), dweight


FUSED = Formulas(
    norm_forward,
    _add_norm,
    _norm_backward,
    split_forward,
    split_backward,
    swiglu_forward,
    swiglu_backward,
)


def compiled_formulas(compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Formulas:
    """Return the formulas written out for a compiler, each by `compiled`."""
    return Formulas(
        norm=compiled(written_norm),
        add_norm=compiled(written_add_norm),
        norm_backward=compiled(written_norm_backward),
        split=compiled(written_split),
        split_backward=compiled(written_split_backward),
        swiglu=compiled(written_swiglu),
        swiglu_backward=compiled(written_swiglu_backward),
    )


def written_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm y = x r w with r = (mean(x^2) + eps)^-1/2, of [n, h]: y, and the wide r [n, 1]."""
    wide = x.to(wide_dtype(x.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype), scale


def written_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual sum x + residual of [n, h], and `written_norm` of it."""
    total = x + residual
    return total, *written_norm(total, weight, eps)


def written_norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `written_norm`; that of the residual stream is added to x's.

    dx = r (w dy) - x r^3 mean(x w dy), dw = sum of x r dy.
    """
    gradient, value = dy.to(scale.dtype), x.to(scale.dtype)
    pulled = gradient * weight
    pull = (pulled * value).mean(-1, keepdim=True) * scale**3
    dx = pulled * scale - value * pull + residual
    dweight = (gradient * value * scale).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def written_split(
    packed: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split and rotate like `elementwise.split_forward`, by tables that are cut.

    The results are contiguous, which `plain` attention reads faster.
    """
    s, b, _ = packed.shape
    # The order of the results: [s, b, heads, d] -> [b, heads, s, d].
    whole = packed.view(s, b, heads + 2 * kv_heads, -1).permute(1, 2, 0, 3)
    q, k, v = whole.split((heads, kv_heads, kv_heads), dim=1)
    q, k = (_turned(part, cos, sin) for part in (q, k))
    return q, k, v.clone(memory_format=torch.contiguous_format)


def written_split_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of `written_split`: [s, b, (n + 2 n_kv) d]."""
    dq, dk = (_turned(part, cos, -sin) for part in (dq, dk))
    return torch.cat((dq, dk, dv), dim=1).permute(2, 0, 1, 3).flatten(2, 3).contiguous()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [b, n, s, d] by cos [s, 1, 1, d] and sin [s, 1, 1, d/2]; contiguous."""
    wide = x.to(wide_dtype(x.dtype))
    first, second = wide.chunk(2, dim=-1)
    half = x.shape[-1] // 2
    # Both halves of a head turn by the same angles.
    cos, sin = cos[:, 0, 0, :half], sin[:, 0, 0]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype).contiguous()


def written_swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU silu(gate) up of [n, 2f] -> [n, f]."""
    gate, up = (part.to(wide_dtype(gate_up.dtype)) for part in gate_up.chunk(2, dim=-1))
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def written_swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `written_swiglu`, as one tensor [n, 2f]."""
    gate, up = (part.to(wide_dtype(gate_up.dtype)) for part in gate_up.chunk(2, dim=-1))
    passing = torch.sigmoid(gate)
    wide = dy.to(gate.dtype)
    dgate = wide * up * passing * (1 + gate * (1 - passing))
    return torch.cat((dgate, wide * gate * passing), dim=-1).to(gate_up.dtype)
