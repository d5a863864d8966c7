"""Host memory that CPU ranks of one machine share for transfers (`parallel.shared_memory`).

- The transports take their sizes from here, so the plan counts what they map.
- Two ranks of an axis are one pair. Of three or four each two are a pair. Two ranks of a pipeline
  have a channel. More ranks, and those of unlike machines, keep gloo.
- A memory is mapped by two ranks. It is counted in full for each of them, and once for a machine.

Alternatives considered:
- A part of each rank's planned total: two ranks that share a memory would have it twice.
"""

from __future__ import annotations

from collections.abc import Collection

from k2train.plan.layout import Layout

PAIR_BLOCK_BYTES = CHANNEL_BLOCK_BYTES = 2**20
"""Bytes of a block; a larger tensor goes in several. It fits the second cache of a processor."""
PAIR_BLOCKS = 2
"""Blocks of each rank of a pair. A rank that fills one again has heard, by the note of the block
between, that the other rank has read it."""
CHANNEL_BLOCKS = 8
"""Blocks of each rank of a channel: what it may have sent and the other rank has not read."""
PAIR_BYTES = 2 * PAIR_BLOCKS * PAIR_BLOCK_BYTES
CHANNEL_BYTES = 2 * CHANNEL_BLOCKS * CHANNEL_BLOCK_BYTES
MESH_SIZES = (3, 4)
"""Numbers of ranks of which each two are a pair."""


def rank_bytes(layout: Layout, waits: bool) -> int:
    """Bytes that one rank maps, if the others of its groups are on its machine.

    `waits`: collectives are waited for. Those that overlap keep gloo.
    """
    paired = (layout.tensor, layout.data) if waits else ()
    pairs = sum(size - 1 for size in paired if size in (2, *MESH_SIZES))
    return pairs * PAIR_BYTES + (CHANNEL_BYTES if layout.pipeline == 2 else 0)


def machine_bytes(layout: Layout, ranks: Collection[int], waits: bool) -> int:
    """Bytes of all memories between the `ranks` of one machine."""
    here, total = set(ranks), 0
    for axis in ("tp", "dp", "pp"):
        for group in layout.groups(axis):
            size = len(group)
            if not here.issuperset(group):
                continue
            if axis == "pp":
                total += CHANNEL_BYTES if size == 2 else 0
            elif waits and size in (2, *MESH_SIZES):
                total += size * (size - 1) // 2 * PAIR_BYTES
    return total
