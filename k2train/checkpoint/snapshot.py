"""A copy of this rank's training state in host memory, which a save writes while training goes on.

The buffers are kept from one save to the next (and pinned where the state lies on a device): a gigabyte of fresh memory
costs more in page faults than the copy does. One set is enough, since a second save waits for the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2train import fault_injection
from k2train.parallel.grad_buffer import ShardLayout


@dataclass(frozen=True)
class Snapshot:
    """A frozen copy of this rank's state in host memory."""

    layout: ShardLayout
    flat_shards: Mapping[str, Tensor]
    dtype: torch.dtype


@dataclass
class HostBuffers:
    """Host lines that are filled again and again; whoever asks for a snapshot ends the life of the one before."""

    buffers: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def snapshot(
        self, layout: ShardLayout, flat_shards: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Snapshot:
        """Copy the optimizer lines [elements]; `dtype` is that of the model's weights."""
        fault_injection.point("save.snapshot")
        waiting = set()
        for state, flat_shard in flat_shards.items():
            buffer = self.buffers.get(state)
            if (
                buffer is None
                or buffer.shape != flat_shard.shape
                or buffer.dtype != flat_shard.dtype
            ):
                buffer = torch.empty(
                    flat_shard.shape,
                    dtype=flat_shard.dtype,
                    pin_memory=flat_shard.device.type == "cuda",
                )
                self.buffers[state] = buffer
            buffer.copy_(flat_shard.detach(), non_blocking=True)
            if flat_shard.device.type == "cuda":
                waiting.add(flat_shard.device)
        for device in waiting:
            torch.cuda.current_stream(device).synchronize()
        return Snapshot(layout, {state: self.buffers[state] for state in flat_shards}, dtype)


def snapshot(
    layout: ShardLayout, flat_shards: Mapping[str, Tensor], dtype: torch.dtype
) -> Snapshot:
    """A snapshot in memory of its own."""
    return HostBuffers().snapshot(layout, flat_shards, dtype)
