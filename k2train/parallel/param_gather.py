"""ZeRO parameter all-gather: optimized values into the parameters of all data-parallel ranks.

- Each rank holds its rows of a bucket. The gather of one bucket runs behind the update of the next.
  With `dp.overlap` it also runs behind the forward pass, until its parameters are first used.
- The stage announces the first use by a call (`wait_for`, once per child module). Other readers of
  parameters call `finish` first.

Alternatives considered:
- A forward hook on the module: weights are also read without a call of their module (the loss reads
  the head's), and a hook that is added and removed would recompile a compiled block in every step.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k2train.parallel.collectives import Pending, swap_start
from k2train.parallel.comm_tracker import CombinedWork, collective_scope
from k2train.parallel.grid import Axis
from k2train.parallel.shard_layout import Bucket, ShardLayout

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_shards(shards: Tensor, axis: Axis, wait: bool) -> Pending:
    """Start to fill `shards` [size, n] with all ranks' shards; this rank has written its own.

    Collective.

    On a CPU every shard goes straight from its rank to each of the others: gloo's all-gather takes
    three times as long.
    """
    if axis.size == 1:
        return Pending(shards)

    name = f"all-gather of weights {axis.name}"

    if wait and axis.pair is not None:
        swap_start(shards[axis.rank], shards[1 - axis.rank], axis, wait, name)
        return Pending(shards)

    if wait and axis.mesh is not None:
        with collective_scope(axis.comm, name):
            axis.mesh.swap([shards[axis.rank]] * axis.size, shards, name)
        return Pending(shards)

    if shards.device.type != "cpu":
        with collective_scope(axis.comm, name):
            work = _all_gather(
                shards.view(-1), shards[axis.rank], group=axis.group, async_op=not wait
            )
        return Pending(shards, work, None, axis, name)

    transfers: list[Any] = []
    with collective_scope(axis.comm, name):
        for step in range(1, axis.size):
            target, source = (axis.rank + step) % axis.size, (axis.rank - step) % axis.size
            transfers.append(dist.irecv(shards[source], group=axis.group, group_src=source))
            transfers.append(dist.isend(shards[axis.rank], group=axis.group, group_dst=target))

    pending = Pending(shards, CombinedWork([work.wait for work in transfers]), None, axis, name)
    if wait:
        pending.wait()

    return pending


class ParamGather:
    """Writes buckets of values into the parameters of a `ShardLayout`."""

    def __init__(self, shard_layout: ShardLayout):
        self.shard_layout, self.dp = shard_layout, shard_layout.dp
        self._pending: list[tuple[Bucket, Pending]] = []

    @torch.no_grad()
    def start(self, bucket: Bucket, values: Tensor) -> None:
        """Start the all-gather of a bucket into every rank's parameters. Collective.

        `values` [bucket.elements] are this rank's, rounded here to the parameters' dtype.
        """
        if not bucket.slots:
            return

        dtype = bucket.slots[0].parameter.dtype
        shards = torch.empty(self.dp.size, bucket.elements, dtype=dtype, device=values.device)
        shards[self.dp.rank].copy_(values)
        self._pending.append((bucket, gather_shards(shards, self.dp, wait=not self.dp.overlap)))
        if not self.dp.overlap:
            self.finish()

    def wait_for(self, module: nn.Module) -> None:
        """Wait until the parameters of `module` hold their latest values."""
        if self._pending:
            wanted = {id(parameter) for parameter in module.parameters()}
            wanted_at = [
                n
                for n, (bucket, _) in enumerate(self._pending)
                if any(id(s.parameter) in wanted for s in bucket.slots)
            ]
            # Transfers complete in order, so all earlier ones are collected too.
            self._collect(wanted_at[-1] + 1 if wanted_at else 0)

    def finish(self) -> None:
        """Wait until all parameters hold their latest values."""
        self._collect(len(self._pending))

    @torch.no_grad()
    def _collect(self, count: int) -> None:
        for bucket, pending in self._pending[:count]:
            shards = pending.wait()
            for slot in bucket.slots:
                for held, out in self.shard_layout.each_block(
                    shards, slot, slot.param_slice.of(slot.parameter.data), bucket.start
                ):
                    out.copy_(held)
        self._pending = self._pending[count:]
