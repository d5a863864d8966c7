"""A transformer layer as one autograd function, with its backward written out.

- In a small layer the host works longer than the operators: autograd's engine, and a function in
  Python for each of nine parts, forward and backward. Here the engine sees one function a layer.
- It calls the formulas of the parts, in the order in which autograd would. So no bit changes, and
  the collectives of tensor parallelism and the deferred weight gradients are the same.
- It serves the kernels whose two directions are functions of their own (`formulas`): the fused or
  compiled norm, split and SwiGLU on a CPU, and `plain` attention. With other kernels, recomputed
  layers, documents, and without gradient sums the parts stay functions of their own.
- A layer that was changed after it was built runs part by part: see `layer_changes`.

Alternatives considered:
- The whole stage as one function: saves two functions a micro-batch, and nothing of a layer.
- A backward without autograd's engine: one function a layer costs it 10 us of 800.
- `save_for_backward`: keeps all of a layer until its backward ends. Here each part frees its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2train.model.kernels.attention import PLAIN_PRODUCTS, plain_backward, plain_forward
from k2train.model.kernels.elementwise import cut_tables
from k2train.model.kernels.formulas import Formulas
from k2train.model.kernels.select import Kernels
from k2train.model.layer_changes import Layer, is_unchanged
from k2train.model.layers import RMSNorm, Rotary
from k2train.parallel.grad_accumulation import accumulated
from k2train.parallel.tensor_parallel import ColumnLinear, RowLinear


def formulas_of(kernels: Kernels) -> Formulas | None:
    """Formulas of these kernels, on a CPU; None where one of them has none."""
    return kernels.formulas if kernels.attention in PLAIN_PRODUCTS else None


def runs_as_one(layer: Layer, x: Tensor) -> bool:
    """Whether a layer whose kernels have formulas can run x [s(/tp), b, h] as one function."""
    if not (x.is_cpu and x.requires_grad and torch.is_grad_enabled()):
        return False
    return is_unchanged(layer)


def run_as_one(layer: Layer, x: Tensor, rotary: Rotary) -> Tensor:
    """Apply a layer as one autograd function: [s(/tp), b, h] -> the same shape. Collective."""
    return _Layer.apply(x, layer, rotary)


_below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context in which operators do not ask autograd, which records nothing here anyway.

torch's own functions in C++ compute their forward and backward below it. It saves a twentieth of a
small step.
"""


class _Layer(torch.autograd.Function):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, rotary: Rotary) -> Tensor:
        # Detached: what is kept must not hold the history of x.
        rows = x.detach().flatten(0, 1)
        formulas = layer.formulas
        assert formulas is not None, "a layer without formulas runs part by part"
        with _below_autograd():
            mixed, attended = _attention_forward(layer, formulas, rows, x.shape[1], rotary)
            y, fed = _mlp_forward(layer, formulas, mixed, rows)
        ctx.layer, ctx.formulas = layer, formulas
        ctx.kept, ctx.version = (attended, fed), rows._version
        # Not a view to autograd, which refuses to change views of a function in place.
        return torch.ops.aten._unsafe_view.default(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        if ctx.kept is None:
            raise RuntimeError(
                "a layer went backward a second time: it frees what it keeps in the first, "
                "retain_graph or not"
            )
        (attended, fed), ctx.kept = ctx.kept, None
        # What `save_for_backward` would check.
        if attended[0]._version != ctx.version:
            raise RuntimeError(
                "the input of a layer has been modified by an inplace operation before its backward"
            )
        with _below_autograd():
            gradient = _mlp_backward(ctx.layer, ctx.formulas, dy.flatten(0, 1), fed)
            gradient = _attention_backward(ctx.layer, ctx.formulas, gradient, dy.shape[1], attended)
        return gradient.view(dy.shape), None, None


def _attention_forward(
    layer: Layer, formulas: Formulas, x: Tensor, b: int, rotary: Rotary
) -> tuple[Tensor, list[Any]]:
    """Rows x [n(/tp), h] of b sequences -> attention(norm(x)), and what the backward pops."""
    norm, attention = layer.attention_norm, layer.attention
    normed, scale = formulas.norm(x, norm.weight, norm.eps)
    packed, multiplied = attention.qkv.forward_rows(normed)

    packed = packed.view(-1, b, packed.shape[1])
    cos, sin = cut_tables(rotary.cos, rotary.sin, packed.shape[0])
    heads = formulas.split(packed, cos, sin, attention.heads, attention.kv_heads)
    # Freed before the scores are made.
    del packed, normed

    mixed, probabilities = plain_forward(*heads, PLAIN_PRODUCTS[attention.kernel] or x.dtype)
    # Its memory order is [s, b, n, d], so these rows are a view.
    rows = mixed.permute(2, 0, 1, 3).reshape(-1, attention.heads * attention.head_dim)
    kept = [x, scale, multiplied, (cos, sin), heads, probabilities, rows]
    return attention.output.forward_rows(rows), kept


def _attention_backward(
    layer: Layer, formulas: Formulas, dy: Tensor, b: int, kept: list[Any]
) -> Tensor:
    norm, attention = layer.attention_norm, layer.attention
    dmixed = _product_backward(attention.output, dy, kept)

    probabilities, (q, k, v), (cos, sin) = kept.pop(), kept.pop(), kept.pop()
    dmixed = dmixed.view(-1, b, attention.heads, attention.head_dim).permute(1, 2, 0, 3)
    dtype = PLAIN_PRODUCTS[attention.kernel] or dy.dtype
    dheads = plain_backward(dmixed, q, k, v, probabilities, dtype)
    # Each is freed as soon as it was used, as by autograd.
    del dmixed, q, k, v, probabilities
    gradient = formulas.split_backward(*dheads, cos, sin).flatten(0, 1)
    del dheads

    gradient = _product_backward(attention.qkv, gradient, kept)
    return _norm_backward(formulas, norm, gradient, kept, dy)


def _mlp_forward(
    layer: Layer, formulas: Formulas, x: Tensor, residual: Tensor
) -> tuple[Tensor, list[Any]]:
    """Rows of one shape [n(/tp), h]; z = x + residual -> z + mlp(norm(z)), and for the backward."""
    norm, mlp = layer.mlp_norm, layer.mlp
    x, normed, scale = formulas.add_norm(x, residual, norm.weight, norm.eps)
    gate_up, multiplied = mlp.gate_up.forward_rows(normed)
    active = formulas.swiglu(gate_up)
    kept = [x, scale, multiplied, gate_up, active]
    return mlp.down.forward_rows(active).add_(x), kept


def _mlp_backward(layer: Layer, formulas: Formulas, dy: Tensor, kept: list[Any]) -> Tensor:
    norm, mlp = layer.mlp_norm, layer.mlp
    gradient = _product_backward(mlp.down, dy, kept)
    gradient = formulas.swiglu_backward(gradient, kept.pop())
    gradient = _product_backward(mlp.gate_up, gradient, kept)
    return _norm_backward(formulas, norm, gradient, kept, dy)


def _product_backward(part: ColumnLinear | RowLinear, dy: Tensor, kept: list[Any]) -> Tensor:
    dx, dweight = part.backward_rows(dy, kept.pop())
    assert dx is not None, "the gradient of a layer's input is always wanted"
    assert dweight is None, "a weight was replaced between a layer's forward and backward"
    return dx


def _norm_backward(
    formulas: Formulas, norm: RMSNorm, dy: Tensor, kept: list[Any], residual: Tensor
) -> Tensor:
    scale, x = kept.pop(), kept.pop()
    dx, dweight = formulas.norm_backward(dy, x, scale, norm.weight, residual)
    left = accumulated(norm.weight, dweight)
    assert left is None, "a weight was replaced between a layer's forward and backward"
    return dx
