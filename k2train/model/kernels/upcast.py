"""bf16 matrix products upcast to fp32 (`kernels.matmul: upcast`), for a CPU without bf16
instructions.

- Such a CPU emulates bf16 products, several times slower than fp32. Here the factors are upcast,
  multiplied in fp32 and the result is rounded to bf16. That is what the instructions do: exact
  products of bf16 numbers, summed in fp32.
- Weight gradients are added to their fp32 sums without being rounded to bf16 before.
- Attention likewise. It keeps bf16 tensors for the backward, as without upcast.
- `auto` means upcast where precision is bf16 and the CPU is known to have no bf16 instructions.

Alternatives considered:
- fp32 weights and activations: twice the memory, and other numbers than on a GPU.
- An upcast weight kept between products: twice the memory of the weights for less than a tenth of
  a product's time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2train.errors import ConfigError
from k2train.model.kernels.attention import (
    PLAIN_DOCUMENTS_UP_TO,
    Attention,
    reference_attention,
    upcast_plain_attention,
)
from k2train.model.kernels.documents import Documents
from k2train.model.kernels.processor_library import fp32_library_of_processor
from k2train.model.kernels.product_choice import product_of
from k2train.parallel.collective_matmul import Product


class UpcastProduct(Product):
    """Products of bf16 factors in fp32, by `wide`."""

    writes_out = False

    def __init__(self, wide: Product):
        self.wide = wide

    def multiply(
        self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
    ) -> Tensor:
        y = self.wide.multiply(a.float(), matrix.float(), gradient)
        return y.to(a.dtype) if out is None else out.copy_(y)

    def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
        self.wide.add_weight_gradient(into, dy.float(), x.float())

    def gradient_sums(self, device: torch.device, dtype: torch.dtype) -> str:
        return self.wide.gradient_sums(device, torch.float32)


def upcast_product(device: torch.device, dtype: torch.dtype) -> UpcastProduct:
    """Return the products of `kernels.matmul: upcast`.

    Raises ConfigError where they would change nothing, or be slower than a GPU's own.
    """
    if device.type != "cpu":
        raise ConfigError(
            f"kernels.matmul (upcast) is for a CPU, and this is {device.type}: choose auto"
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            "kernels.matmul (upcast) is for precision bf16, "
            "and products are fp32 already: choose auto"
        )
    return UpcastProduct(product_of(fp32_library_of_processor()))


class _UpcastFlash(torch.autograd.Function):
    """torch's flash kernel for CPUs on upcast q, k, v. Keeps them, and its result, in bf16."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.float(), _repeated(k, q), _repeated(v, q), 0.0, True
        )
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout.float(),
            q.float(),
            _repeated(k, q),
            _repeated(v, q),
            out.float(),
            log_sums,
            0.0,
            True,
        )
        return dq.to(q.dtype), _summed(dk, k), _summed(dv, v)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Upcast keys or values [b, n_kv, s, d], each repeated for its queries -> [b, n, s, d]."""
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _summed(gradient: Tensor, x: Tensor) -> Tensor:
    """Sum the gradient [b, n, s, d] over the queries of each key or value, as `x`."""
    b, heads, s, d = x.shape
    return gradient.view(b, heads, -1, s, d).sum(2).to(x.dtype)


def upcast_flash_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:
    """Causal attention of bf16 q [b, n, s, d], k and v [b, n_kv, s, d] by torch's kernel in fp32.

    The result [b, n, s, d] is rounded to bf16 once.
    """
    assert documents is None, "documents are packed before this kernel"
    return _UpcastFlash.apply(q, k, v)


def upcast_by_length_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:
    """`by_length_attention` with products in fp32."""
    short = q.shape[2] <= PLAIN_DOCUMENTS_UP_TO.get(q.dtype, 0)
    return (upcast_plain_attention if short else upcast_flash_attention)(q, k, v, documents)


UPCAST_ATTENTION: dict[str, Attention] = {
    "sdpa": upcast_flash_attention,
    "flash": upcast_flash_attention,
    "plain": upcast_plain_attention,
    "by_length": upcast_by_length_attention,
    "reference": reference_attention,
}
"""Attention kernels of a CPU beside upcast products, by their config names."""
