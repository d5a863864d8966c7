"""Connections of a rank: process groups, TCP sockets and open files by layout and device.

- gloo connects every rank of a group with every other one when the group is made. Two groups span
  the world, one for the main thread and one for the saving thread: a rank of W processes has about
  2 W sockets.
- Above `FLAT_RANKS` each of the two is made of rows (`parallel.host_group`): about 2 sqrt(W)
  sockets, and 4 sqrt(W) for the first rank of a row.
- On a CPU the groups along the axes are gloo's, too. On CUDA they are NCCL's, which connects when a
  group is first used, and with few sockets.
- Counted on Linux with torch 2.13: a gloo group of n ranks has n - 1 connections, a socket that
  listens, and 3 files of its event loop.
- Each rank of a gloo group reads the addresses of all others from the store that rank 0's machine
  serves: `store_reads` of the whole job grow with the square of the world up to `FLAT_RANKS`, and
  with its power 1.5 above.

Alternatives considered:
- A fixed number that is surely enough: at 16,384 ranks it is not.
"""

from dataclasses import dataclass
from math import isqrt

from k2train.plan.layout import Layout

FLAT_RANKS = 512
"""Ranks up to which all are one group of host tensors."""
AXES_AND_STAGE = ("tp", "dp", "pp", "stage")
LOOP_FILES = 3
"""Files of a gloo group's event loop."""
PAIR_BYTES, GROUP_BYTES = 544 * 10**6, 688 * 10**6
"""Device memory of an NCCL communicator of 2 ranks, and of more: an estimate.

Measured by others on 4 A100 with NVLink (NVIDIA/nccl#964). It grows with the number of channels, so
with the links of a device, and not with the model.
"""
OTHER_FILES = 512
"""Room for all other files of a training: chunks, record, heartbeats, devices, NCCL."""


@dataclass(frozen=True)
class Connections:
    """What rank 0 has open once its grid is built. No rank of the layout has more."""

    gloo_groups: tuple[int, ...]
    """Ranks of each gloo group that the rank is in."""
    device_groups: tuple[int, ...]
    """Ranks of each group of devices that the rank is in."""
    other_gloo_groups: tuple[int, ...]
    """Those of a rank that is no first one of a row of host tensors."""
    world_size: int
    device_pairs: int
    """Most pipeline neighbours of a rank on devices; each pair has a communicator of its own."""

    @property
    def communicators(self) -> int:
        """Communicators of NCCL that a rank may have."""
        return len(self.device_groups) + self.device_pairs

    @property
    def communicator_bytes(self) -> int:
        """Device memory of these communicators, an estimate. No part of the planned memory."""
        sizes = (*self.device_groups, *[2] * self.device_pairs)
        return sum(PAIR_BYTES if size == 2 else GROUP_BYTES for size in sizes)

    @property
    def sockets(self) -> int:
        """TCP sockets of the gloo groups: a connection for each peer, and one that listens."""
        return sum(self.gloo_groups)

    @property
    def files(self) -> int:
        """Open files that a process may need, rank 0's, which may serve the store, among them."""
        loops = LOOP_FILES * len(self.gloo_groups)
        return self.sockets + loops + self.world_size + OTHER_FILES

    @property
    def store_reads(self) -> int:
        """Addresses that all ranks together read from the store while they meet."""
        firsts = 0
        if self.gloo_groups != self.other_gloo_groups:
            firsts = -(-self.world_size // host_row_ranks(self.world_size))
        first, other = (
            sum(size - 1 for size in groups)
            for groups in (self.gloo_groups, self.other_gloo_groups)
        )
        return firsts * first + (self.world_size - firsts) * other


def host_row_ranks(world_size: int, flat_ranks: int = FLAT_RANKS) -> int:
    """Consecutive ranks that are one row of a group of host tensors: all, or about the root."""
    return world_size if world_size <= flat_ranks else isqrt(world_size - 1) + 1


def connections(layout: Layout, device_type: str) -> Connections:
    """Count the groups and sockets of a rank of `layout` on `cpu` or `cuda`."""
    world = layout.world_size
    axes = {layout.peers(0, axis) for axis in AXES_AND_STAGE}
    sizes = tuple(sorted(len(ranks) for ranks in axes if len(ranks) > 1))
    # The main thread's and the saving thread's. On a CPU the first is the default group, and that
    # of every axis that spans the world.
    row = host_row_ranks(world)
    other = (row,)
    own = other if row == world else (row, -(-world // row))
    if device_type == "cpu":
        below = tuple(size for size in sizes if size < world)
        return Connections((*below, world, *own), (), (*below, world, *other), world, 0)
    pairs = min(2, layout.pipeline - 1)
    return Connections(own + own, sizes, other + other, world, pairs)
