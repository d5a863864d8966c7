"""SwiGLU in Triton, forward and backward: silu(gate) up, [..., 2f] -> [..., f].

- One pass each way. Keeps the input only: computing silu again costs no memory traffic.
- Computed in fp32 and rounded once.

Formula: Shazeer 2020, arXiv:2002.05202; silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024
"""Values of gate, and of up, in one program."""


@triton.jit
def _forward_kernel(gate_up, out, features, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    source = gate_up + row * 2 * features + columns

    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + features, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * features + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(gate_up, dy, gradient, features, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < features
    at = row * 2 * features + columns

    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + features, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(dy + row * features + columns, mask=inside, other=0.0).to(tl.float32)

    open_share = 1.0 / (1.0 + tl.exp(-gate))
    dgate = incoming * up * open_share * (1.0 + gate * (1.0 - open_share))
    dup = incoming * gate * open_share
    dtype = gradient.dtype.element_ty
    tl.store(gradient + at, dgate.to(dtype), mask=inside)
    tl.store(gradient + at + features, dup.to(dtype), mask=inside)


def _launch(kernel: Any, rows: int, features: int, *tensors: Tensor) -> None:
    """Run a kernel over all blocks of all rows."""
    blocks = triton.cdiv(features, BLOCK)
    if rows * blocks:
        kernel[(rows * blocks,)](
            *tensors, features, blocks, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
        )


class _SwiGlu(torch.autograd.Function):
    """Keeps the input only."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        features = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], features)
        _launch(_forward_kernel, gate_up.shape[:-1].numel(), features, gate_up, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gradient, dy = torch.empty_like(gate_up), dy.contiguous()
        _launch(_backward_kernel, dy.shape[:-1].numel(), dy.shape[-1], gate_up, dy, gradient)
        return gradient


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU of gate and up side by side: [..., 2f] -> [..., f]."""
    return _SwiGlu.apply(gate_up)
