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

    table: ShardLayout
    lines: Mapping[str, Tensor]
    dtype: torch.dtype


@dataclass
class HostBuffers:
    """Host lines that are filled again and again; whoever asks for a snapshot ends the life of the one before."""

    kept: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def snapshot(
        self, table: ShardLayout, lines: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Snapshot:
        """Copy the optimizer lines [elements]; `dtype` is that of the model's weights."""
        fault_injection.point("save.snapshot")
        waiting = set()
        for state, line in lines.items():
            buffer = self.kept.get(state)
            if buffer is None or buffer.shape != line.shape or buffer.dtype != line.dtype:
                buffer = torch.empty(
                    line.shape, dtype=line.dtype, pin_memory=line.device.type == "cuda"
                )
                self.kept[state] = buffer
            buffer.copy_(line.detach(), non_blocking=True)
            if line.device.type == "cuda":
                waiting.add(line.device)
        for device in waiting:
            torch.cuda.current_stream(device).synchronize()
        return Snapshot(table, {state: self.kept[state] for state in lines}, dtype)


def snapshot(table: ShardLayout, lines: Mapping[str, Tensor], dtype: torch.dtype) -> Snapshot:
    """A snapshot in memory of its own."""
    return HostBuffers().snapshot(table, lines, dtype)
