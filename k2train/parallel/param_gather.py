"""Optimized values back into the parameters of every data-parallel rank, a bucket at a time.

Each rank holds its rows of a bucket; the gather of one bucket runs behind the update of the next, and with `dp.overlap`
behind the forward pass too: it is waited for where its parameters are first used. That place is named by a call
(`wait_for`, from the stage, once a child module) and not by a forward hook on the module: weights are also read without
calling the module that holds them (the loss reads the head's), and a hook that comes and goes would make a compiled block
compile again in every step. Whoever reads parameters otherwise calls `finish` first.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k2train.parallel.collectives import Pending
from k2train.parallel.comm_tracker import AllOf, collective_scope
from k2train.parallel.grad_buffer import Bucket, ShardLayout
from k2train.parallel.grid import Axis

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_lines(lines: Tensor, axis: Axis, wait: bool) -> Pending:
    """Begin to fill `lines` [size, n], of which this rank has written its own line, with those of all ranks.

    On a CPU every line goes straight from its rank to each of the others: gloo's all-gather takes three times as long.
    """
    if axis.size == 1:
        return Pending(lines)
    name = f"all-gather of weights {axis.name}"
    if lines.device.type != "cpu":
        with collective_scope(axis.comm, name):
            work = _all_gather(
                lines.view(-1), lines[axis.rank], group=axis.group, async_op=not wait
            )
        return Pending(lines, work, None, axis, name)
    under_way: list[Any] = []
    with collective_scope(axis.comm, name):
        for step in range(1, axis.size):
            there, here = (axis.rank + step) % axis.size, (axis.rank - step) % axis.size
            under_way.append(dist.irecv(lines[here], group=axis.group, group_src=here))
            under_way.append(dist.isend(lines[axis.rank], group=axis.group, group_dst=there))
    pending = Pending(lines, AllOf([work.wait for work in under_way]), None, axis, name)
    if wait:
        pending.wait()
    return pending


class ParamGather:
    """Writes buckets of values into the parameters of a `ShardLayout`."""

    def __init__(self, table: ShardLayout):
        self.table, self.dp = table, table.dp
        self._under_way: list[tuple[Bucket, Pending]] = []

    @torch.no_grad()
    def put(self, bucket: Bucket, values: Tensor) -> None:
        """Send this rank's `values` [bucket.elements], rounded to the parameters' dtype, to every rank's parameters."""
        if not bucket.slots:
            return
        dtype = bucket.slots[0].parameter.dtype
        lines = torch.empty(self.dp.size, bucket.elements, dtype=dtype, device=values.device)
        lines[self.dp.rank].copy_(values)
        self._under_way.append((bucket, gather_lines(lines, self.dp, wait=not self.dp.overlap)))
        if not self.dp.overlap:
            self.finish()

    def wait_for(self, module: nn.Module) -> None:
        """Return when the parameters of `module` hold what was put last."""
        if self._under_way:
            wanted = {id(parameter) for parameter in module.parameters()}
            place = [
                n
                for n, (bucket, _) in enumerate(self._under_way)
                if any(id(s.parameter) in wanted for s in bucket.slots)
            ]
            self._settle(place[-1] + 1 if place else 0)

    def finish(self) -> None:
        """Return when all parameters hold what was put last."""
        self._settle(len(self._under_way))

    @torch.no_grad()
    def _settle(self, count: int) -> None:
        for bucket, pending in self._under_way[:count]:
            lines = pending.wait()
            for slot in bucket.slots:
                for held, out in self.table.each_block(
                    lines, slot, slot.piece.of(slot.parameter.data), bucket.start
                ):
                    out.copy_(held)
        self._under_way = self._under_way[count:]
