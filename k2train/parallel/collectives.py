"""The conjugate pairs of tensor and sequence parallelism: what one does forward, its partner does backward.

    copy_in      identity        | all-reduce        enter a column-parallel product, activations replicated
    reduce_out   all-reduce      | identity          leave a row-parallel product, activations replicated
    gather_in    all-gather      | reduce-scatter    enter a column-parallel product, activations split along the sequence
    scatter_out  reduce-scatter  | all-gather        leave a row-parallel product, activations split along the sequence

Source: Shoeybi et al. 2019 (arXiv:1909.08053) section 3; Korthikanti et al. 2022 (arXiv:2205.05198) section 4.2.2.
The sequence is dimension 0, so a gather or scatter is one contiguous copy. Each is nothing on an axis of one.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.parallel.grid import Axis

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over an axis and return `x`."""
    if axis.size > 1:
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[n, ...] -> [n * size, ...], blocks in rank order."""
    if axis.size == 1:
        return x
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    _all_gather(out, x.contiguous(), group=axis.group)
    return out


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """[n * size, ...] -> [n, ...]: the sum over ranks, block `rank` of it."""
    if axis.size == 1:
        return x
    assert x.shape[0] % axis.size == 0, f"dimension 0 ({x.shape[0]}) must be divisible by {axis}"
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    _reduce_scatter(out, x.contiguous(), group=axis.group)
    return out


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same tensor to another node, and the sum is made in place.
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _ReduceOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.axis), None


class _ScatterOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


def enter_parallel(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Before a column-parallel product: [s/tp, b, h] -> [s, b, h] with `sequence`, else [s, b, h] unchanged."""
    if axis.size == 1:
        return x
    return (_GatherIn if sequence else _CopyIn).apply(x, axis)


def leave_parallel(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """After a row-parallel product, partial sums [s, b, h] -> [s/tp, b, h] with `sequence`, else [s, b, h]."""
    if axis.size == 1:
        return x
    return (_ScatterOut if sequence else _ReduceOut).apply(x, axis)
