"""Snapshot of a rank's training state in host memory, written to disk while training continues.

- Buffers are reused between saves, and pinned when the state is on a device. A gigabyte of fresh
  memory costs more in page faults than the copy does.
- One set of buffers is enough, because a second save waits for the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2train import fault_injection
from k2train.parallel.shard_layout import ShardLayout


@dataclass(frozen=True)
class Snapshot:
    """Immutable copy of this rank's flat shards in host memory."""

    layout: ShardLayout
    flat_shards: Mapping[str, Tensor]
    dtype: torch.dtype


@dataclass
class HostBuffers:
    """Reusable host buffers for snapshots. A new snapshot invalidates the previous one."""

    buffers: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def snapshot(
        self, layout: ShardLayout, flat_shards: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Snapshot:
        """Copy the optimizer's flat shards [elements]; `dtype` is that of the model's weights."""
        fault_injection.point("save.snapshot")
        waiting = set()
        for state, flat_shard in flat_shards.items():
            # A reused buffer saves the page faults of fresh memory.
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

        # The copies are asynchronous; the optimizer may change the state only after them.
        for device in waiting:
            torch.cuda.current_stream(device).synchronize()
        return Snapshot(layout, {state: self.buffers[state] for state in flat_shards}, dtype)


def snapshot(
    layout: ShardLayout, flat_shards: Mapping[str, Tensor], dtype: torch.dtype
) -> Snapshot:
    """Take a snapshot in freshly allocated memory."""
    return HostBuffers().snapshot(layout, flat_shards, dtype)
