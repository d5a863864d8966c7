"""Collectives over one axis, blocking or asynchronous, also as autograd functions.

Two autograd functions end a tensor-parallel region:

    reduce_out   all-reduce      | identity      sum over ranks, activations replicated
    scatter_out  reduce-scatter  | all-gather    sum over ranks, split along the sequence

- The left column is the forward pass, the right one its backward.
- Products with their collectives are in `collective_matmul`.
- The sequence is dimension 0, so a gather or scatter is one contiguous copy.
- On an axis of one rank every collective is a no-op.

Sources: Shoeybi et al. 2019 (arXiv:1909.08053) section 3; Korthikanti et al. 2022
(arXiv:2205.05198) section 4.2.2.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.parallel.comm_tracker import collective_scope, wait_scope
from k2train.parallel.grid import Axis

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending:
    """Handle of a collective that may still be running.

    Its tensors must not be written before `wait` returns. `sent`, what it reads, is held until
    then: backends differ in whether they do.

    `axis` and `what` name the collective for the communication tracker.
    """

    def __init__(
        self,
        out: Tensor,
        work: Any = None,
        finish: Callable[[], object] | None = None,
        axis: Axis | None = None,
        what: str = "",
        sent: Tensor | None = None,
    ):
        self._out, self._work, self._finish, self._axis, self._what = out, work, finish, axis, what
        self._sent = sent

    def wait(self) -> Tensor:
        """Return the complete result (on an accelerator: complete for work queued after this).

        May be called again.
        """
        work, self._work = self._work, None
        if work is not None:
            with wait_scope(None if self._axis is None else self._axis.comm, self._what):
                work.wait()
        self._sent = None
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        return self._out


def _is_pair(x: Tensor, axis: Axis) -> bool:
    """Whether the axis is two ranks in host memory, which swap their parts and add.

    gloo's own collectives need more steps and copies for the same result. Medians of two processes,
    fp32, gloo and this: all-reduce of 4 KiB 0.34 and 0.17 ms, of 1 MiB 1.1 and 0.8, of 16 MiB 50
    and 34; all-gather to 1 MiB 0.8 and 0.5; reduce-scatter of 1 MiB 1.1 and 0.5. A sum of two has
    the same bits in either order.
    """
    return axis.size == 2 and x.device.type == "cpu"


def swap_start(
    mine: Tensor,
    out: Tensor,
    axis: Axis,
    wait: bool,
    name: str,
    ours: Tensor | None = None,
    op: Callable[..., Tensor] = torch.add,
) -> Pending:
    """Start to send `mine` to the other of two ranks, and to receive as much into `out`.

    With `ours` the result is op(received, ours), and `out` may be `ours`. All are contiguous and of
    one size. With `wait` it is complete on return. Collective.
    """
    flat = out.view(-1)
    if wait and axis.pair is not None:
        # Combined where the other rank has written it, without a copy.
        receive = partial(_receive, flat, None if ours is None else ours.view(-1), op)
        with collective_scope(axis.comm, name):
            axis.pair.exchange(mine, receive, name)
        return Pending(out)

    received = flat if out is not ours else torch.empty_like(flat)
    splits = [0, mine.numel()] if axis.rank == 0 else [mine.numel(), 0]
    with collective_scope(axis.comm, name):
        work = dist.all_to_all_single(
            received, mine.view(-1), splits, splits, group=axis.group, async_op=not wait
        )

    finish = None
    if ours is not None:
        finish = partial(_receive, flat, ours.view(-1), op, slice(None), received)
    return _finished(Pending(out, work, finish, axis, name, mine), wait)


def _receive(
    out: Tensor, ours: Tensor | None, op: Callable[..., Tensor], part: slice, theirs: Tensor
) -> None:
    """Put what was received of a part into `out`; all flat."""
    if ours is None:
        out[part].copy_(theirs)
    else:
        op(theirs, ours[part], out=out[part])


def _finished(pending: Pending, wait: bool) -> Pending:
    if wait:
        pending.wait()
    return pending


def all_reduce_start(
    x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM, wait: bool = False
) -> Pending:
    """Start an in-place reduction of `x` over an axis.

    With `wait` it is complete on return. Collective.
    """
    if axis.size == 1:
        return Pending(x)

    name = f"all-reduce {axis.name}"
    if _is_pair(x, axis) and op in _IN_PLACE:
        flat = x.contiguous()
        swapped = swap_start(flat, flat, axis, wait, name, flat, _IN_PLACE[op])
        copy = None if flat is x else partial(x.copy_, flat)
        return _finished(Pending(x, swapped, copy), wait)

    with collective_scope(axis.comm, name):
        work = dist.all_reduce(x, op=op, group=axis.group, async_op=not wait)
    return Pending(x, work, None, axis, name)


_IN_PLACE: dict[Any, Callable[..., Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
}


def all_gather_start(x: Tensor, axis: Axis, wait: bool = False) -> Pending:
    """Start an all-gather [n, ...] -> [n * size, ...], blocks in rank order. Collective."""
    if axis.size == 1:
        return Pending(x)
    x, name = x.contiguous(), f"all-gather {axis.name}"
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))

    if wait and axis.mesh is not None:
        gathered = out.view(axis.size, *x.shape)
        with collective_scope(axis.comm, name):
            axis.mesh.swap([x] * axis.size, gathered, name)
        gathered[axis.rank].copy_(x)
        return Pending(out)

    if not _is_pair(x, axis):
        with collective_scope(axis.comm, name):
            work = _all_gather(out, x, group=axis.group, async_op=not wait)
        return Pending(out, work, None, axis, name, x)

    # Two ranks: receive the other's block in place, and copy our own meanwhile.
    blocks = out.view(2, *x.shape)
    swapped = swap_start(x, blocks[1 - axis.rank], axis, wait, name)
    blocks[axis.rank].copy_(x)
    return Pending(out, swapped)


def reduce_scatter_start(x: Tensor, axis: Axis, wait: bool = False) -> Pending:
    """Start a reduce-scatter [n * size, ...] -> [n, ...]: block `rank` of the sum over ranks.

    Collective.

    On a CPU every rank sends each block to its owner, which sums in rank order. gloo's own
    reduce-scatter reduces every block everywhere: twice the transfer, and a bf16 sum rounded once
    per rank.
    """
    if axis.size == 1:
        return Pending(x)

    assert x.shape[0] % axis.size == 0, f"dimension 0 ({x.shape[0]}) must be divisible by {axis}"
    x, name = x.contiguous(), f"reduce-scatter {axis.name}"
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    blocks = x.view(axis.size, *out.shape)

    if _is_pair(x, axis):
        return swap_start(blocks[1 - axis.rank], out, axis, wait, name, blocks[axis.rank])

    if x.device.type != "cpu":
        with collective_scope(axis.comm, name):
            work = _reduce_scatter(out, x, group=axis.group, async_op=not wait)
        return _finished(Pending(out, work, None, axis, name, x), wait)

    received, work = torch.empty_like(x), None
    parts = received.view(axis.size, *out.shape)
    with collective_scope(axis.comm, name):
        if wait and axis.mesh is not None:
            axis.mesh.swap(blocks, parts, name)
            parts[axis.rank].copy_(blocks[axis.rank])
        else:
            work = dist.all_to_all_single(received, x, group=axis.group, async_op=not wait)

    finish = partial(_sum_blocks, parts, out)
    return _finished(Pending(out, work, finish, axis, name), wait)


def _sum_blocks(blocks: Tensor, out: Tensor) -> None:
    """Sum blocks [size, ...] into `out`, first to last.

    Sums of a narrow dtype are rounded once, at the end.
    """
    if blocks.dtype in (torch.float32, torch.float64):
        torch.add(blocks[0], blocks[1], out=out)
        for block in blocks[2:]:
            out.add_(block)
    else:
        torch.sum(blocks, dim=0, out=out)


def all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` in place over an axis and return it. Collective."""
    return all_reduce_start(x, axis, op, wait=True).wait()


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Gather [n, ...] -> [n * size, ...], blocks in rank order. Collective."""
    return all_gather_start(x, axis, wait=True).wait()


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Sum over ranks and return block `rank`: [n * size, ...] -> [n, ...]. Collective."""
    return reduce_scatter_start(x, axis, wait=True).wait()


class _ReduceOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScatterOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis), None


def leave_parallel(x: Tensor, axis: Axis) -> Tensor:
    """Sum the partial results of a row-parallel product over ranks.

    [s, b, h] -> [s/tp, b, h] with `axis.sequence`, else [s, b, h]. Collective.
    """
    if axis.size == 1:
        return x
    return (_ScatterOut if axis.sequence else _ReduceOut).apply(x, axis)
