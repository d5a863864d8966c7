"""A rank's part of the state's digest from host memory, by NumPy on the calling thread.

Torch would split each small step over its threads, which training uses at the same time: on shared cores the two then
wait for each other thousands of times. On a device torch does it where the state lies.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from k2train.checkpoint.tensors import owned
from k2train.fingerprint import LANES, block_sums
from k2train.parallel.state_digest import StateDigest


def state_sums(digest: StateDigest, lines: Mapping[str, Tensor]) -> Tensor:
    """int64 [names * states, 2] in host memory from fp32 lines [elements] by state: what `digest.sums` gives."""
    if lines[digest.states[0]].device.type != "cpu":
        return digest.sums(lines).cpu()
    place = {name: index for index, name in enumerate(digest.names)}
    found = torch.zeros(len(digest.names), len(digest.states), LANES, dtype=torch.int64)
    for box in owned(digest.table, digest.tp):
        for number, state in enumerate(digest.states):
            values = digest.table.local(lines[state], box.slot).detach().numpy()
            sums = block_sums(values, box.offsets, box.slot.piece.global_shape)
            found[place[box.name], number] = torch.tensor([_signed(lane) for lane in sums])
    return found.view(-1, LANES)


def _signed(lane: int) -> int:
    return lane - 2**64 if lane >= 2**63 else lane
