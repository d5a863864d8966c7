"""A rank's part of the state digest, computed from host memory with NumPy on the calling thread.

- Torch would split each small step over its threads, which training uses at the same time. On
  shared cores the two then wait for each other thousands of times.
- For state on a device, torch computes the digest there.
- More threads are used only when nothing else computes: after a load.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from k2train.checkpoint.blocks import Box, owned_boxes
from k2train.parallel.device_digest import StateDigest
from k2train.state_digest import LANES, block_sums


def host_digest_sums(
    digest: StateDigest, flat_shards: Mapping[str, Tensor], threads: int = 1
) -> Tensor:
    """Digest sums int64 [names * states, 2] of the fp32 flat shards [elements] by state.

    Computed in host memory; equals `digest.sums`.
    """
    if flat_shards[digest.states[0]].device.type != "cpu":
        return digest.sums(flat_shards).cpu()

    index_of = {name: index for index, name in enumerate(digest.names)}
    digest_sums = torch.zeros(len(digest.names), len(digest.states), LANES, dtype=torch.int64)

    def add(task: tuple[Box, int, str]) -> None:
        box, state_index, state = task
        values = digest.shard_layout.local(flat_shards[state], box.slot).detach().numpy()
        sums = block_sums(values, box.offsets, box.slot.param_slice.global_shape)
        # Each task writes its own cell, so threads need no lock.
        digest_sums[index_of[box.name], state_index] = torch.tensor(
            [_signed(lane) for lane in sums]
        )

    tasks = [
        (box, *state)
        for box in owned_boxes(digest.shard_layout, digest.tp)
        for state in enumerate(digest.states)
    ]
    if threads == 1:
        for task in tasks:
            add(task)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(add, tasks):
                pass

    return digest_sums.view(-1, LANES)


def _signed(lane: int) -> int:
    # Torch has no unsigned 64-bit integers: store the same bits as a signed one.
    return lane - 2**64 if lane >= 2**63 else lane
