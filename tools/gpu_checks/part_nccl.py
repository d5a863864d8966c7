"""GPU check part `nccl`: the library's collectives in a world of one, for every type in use.

- A group of one is asked explicitly: the grid itself turns collectives of one rank into nothing.
- It proves that the library loads, makes a communicator on this device and takes each type. It
  proves nothing about links: two ranks on one device are refused by NCCL.
- A dry run does the same with gloo, which sends nothing to itself.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import world_of_one
from gpu_checks.numerics import DifferentError

DTYPES = (torch.float32, torch.float64, torch.int64, torch.bfloat16)
"""Activations, gradients and weights; sums of norms and flags; digests."""
COUNT = 1 << 12


def run(bench: Bench) -> None:
    """Ask for every collective with every type."""
    with world_of_one(bench):
        group = dist.new_group([0])
        bench.attempt("backend", lambda: {"backend": backend_of(bench)})
        for name, collective in COLLECTIVES.items():
            for dtype in DTYPES:
                what = f"{name}, {str(dtype).removeprefix('torch.')}"
                bench.attempt(what, partial(held, bench, collective, group, dtype))
        if bench.cuda:
            bench.attempt("send and receive, to itself", partial(sent, bench, group))
        else:
            bench.emit("send and receive, to itself", "unavailable", "gloo sends nothing to itself")


def backend_of(bench: Bench) -> str:
    """Backend of the group for the device, with the version of NCCL."""
    if not bench.cuda:
        return "gloo"
    return f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}"


def values(bench: Bench, dtype: torch.dtype) -> Tensor:
    """Numbers that every type holds exactly."""
    return (torch.arange(COUNT, device=bench.device) % 251 - 125).to(dtype)


def held(
    bench: Bench,
    collective: Callable[[Tensor, Any], Tensor],
    group: Any,
    dtype: torch.dtype,
) -> Mapping[str, Any]:
    """Run a collective of one rank, whose result is its input."""
    sent = values(bench, dtype)
    found = collective(sent.clone(), group)
    if not torch.equal(found, sent):
        raise DifferentError(f"{int((found != sent).sum())} of {COUNT} values changed")
    return {"values": COUNT}


def _reduce(operation: Any, x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, op=operation, group=group)
    return x


def _gather(x: Tensor, group: Any) -> Tensor:
    out = torch.empty_like(x)
    dist.all_gather_into_tensor(out, x, group=group)
    return out


def _scatter(x: Tensor, group: Any) -> Tensor:
    out = torch.empty_like(x)
    dist.reduce_scatter_tensor(out, x, group=group)
    return out


def _broadcast(x: Tensor, group: Any) -> Tensor:
    dist.broadcast(x, 0, group=group)
    return x


COLLECTIVES: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "all-reduce, sum": partial(_reduce, dist.ReduceOp.SUM),
    "all-reduce, maximum": partial(_reduce, dist.ReduceOp.MAX),
    "all-gather": _gather,
    "reduce-scatter": _scatter,
    "broadcast": _broadcast,
}


def sent(bench: Bench, group: Any) -> Mapping[str, Any]:
    """Send to this rank itself: both ends in one batch, as NCCL wants it."""
    out = values(bench, torch.bfloat16)
    into = torch.zeros_like(out)
    both = [dist.P2POp(dist.isend, out, 0, group), dist.P2POp(dist.irecv, into, 0, group)]
    for transfer in dist.batch_isend_irecv(both):
        transfer.wait()
    if not torch.equal(into, out):
        raise DifferentError(f"{int((into != out).sum())} of {COUNT} values changed")
    return {"values": COUNT}
