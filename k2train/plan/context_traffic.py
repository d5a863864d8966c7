"""Context parallelism: exchanges of keys and values in one pass of a layer, and what hides them.

- `ring`: keys and values of the key heads travel from rank to rank, a block beside the attention
  to the block before (Transformer Engine).
- `torch`: keys and values have been repeated for all heads (`repeat_kv` of torchtitan's model).
  They are gathered at once, beside the first of `n` blocks (`_AllGatherRotater`). Each block's
  result is merged into a sum in fp32 (`_SDPAMerger`). In the backward their gradients go around in
  fp32, a step beside each later block and one after the last.
  Source: `torch/distributed/tensor/experimental/_attention.py` of torch 2.6.0, whose blocks are
  balanced: each is as much work as the causal one.

    W  heads x head_dim / tensor      T  tokens of a rank      n  context-parallel ranks

    torch      gathered        2 W T n x 2 bytes       in each pass
               sent            2 W T x 4 bytes         n times in a backward
               merged          W T x 10 bytes          n - 1 times in a forward
                               3 W T x 10 bytes        n times in a backward

Alternatives considered:
- A share of attention's time for the exchange: it is another one in a node than between nodes.
"""

from __future__ import annotations

from typing import NamedTuple

from k2train.plan.hardware import Cluster
from k2train.plan.workload import Workload

KINDS = ("ring", "torch")
MERGED = 10
"""Bytes for an element that is added to its sum: read and written in fp32, and read in bf16."""
NARROW, WIDE = 2, 4
"""Bytes of an element in bf16 and in fp32."""


class Exchange(NamedTuple):
    """One exchange of a pass."""

    seconds: float
    beside: float
    """Share of the pass's attention that runs meanwhile."""


def exchanges_of(
    work: Workload, cluster: Cluster, links: tuple[float, float], backward: bool
) -> tuple[Exchange, ...]:
    """Exchanges of one layer's forward or backward. None without context parallelism."""
    n, stride, tokens = work.context, work.tensor, work.tokens
    if n == 1:
        return ()
    heads = work.shape.num_kv_heads if work.cp_exchange == "ring" else work.shape.num_heads
    both = 2 * heads * work.shape.head_dim / work.tensor * tokens

    if work.cp_exchange == "ring":
        size = NARROW * both * n * (2 if backward else 1)
        return (Exchange(cluster.gather_seconds(size, n, stride, links), 1.0),)

    gathered = cluster.gather_seconds(NARROW * both * n, n, stride, links)
    found = (Exchange(gathered, 1 / n),)
    if not backward:
        return found
    # All ranks of the ring wait for its slowest hop: the one between nodes, where it spans two.
    sent = cluster.send_seconds(WIDE * both, (n - 1) * stride, links)
    return (*found, Exchange((n - 1) * sent, (n - 1) / n), Exchange(sent, 0.0))


def merged_bytes(work: Workload, backward: bool) -> float:
    """Bytes of memory traffic to add the blocks' results: the output, or three gradients."""
    if work.context == 1 or work.cp_exchange == "ring":
        return 0.0
    one = MERGED * work.shape.num_heads * work.shape.head_dim / work.tensor * work.tokens
    return 3 * one * work.context if backward else one * (work.context - 1)
