"""Modules of one tensor-parallel rank without its group, as functions that `part_tp8` times.

- They come from a one-layer engine whose feed-forward and vocabulary have the rank's sizes, so the
  kernels are those that the engine chose for the device.
- Its attention has all heads; the functions on heads get the rank's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu.engines import make_engine
from benchmarks.gpu.sizes import RankPart
from k2train.model.layers import RMSNorm
from k2train.model.transformer import Stage
from k2train.parallel.grad_accumulation import GradAccumulator, attach
from k2train.parallel.grid import ProcessGrid
from k2train.plan.cost import ModelShape


@dataclass(frozen=True)
class RankModules:
    """Local functions in bf16.

    `split` and `attend` as the layer calls them, for one rank's heads.
    """

    stage: Stage
    embedding: nn.Module
    norm: RMSNorm
    activate: Callable[[Tensor], Tensor]
    split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    kernels: str
    strict: bool
    """Whether the engine computes in torch's strict mode."""


def rank_modules(grid: ProcessGrid, rank: RankPart) -> RankModules:
    """Build the modules on the grid's device."""
    heads = rank.num_heads * rank.degree
    shape = ModelShape(1, rank.hidden_size, rank.ffn_hidden_size, heads, heads, rank.vocab_rows)
    engine = make_engine(grid, shape, rank.batch)
    stage = engine.stages[0]
    for parameter in stage.parameters():
        # Sums that nobody counts: the engine's own expect each micro-batch once.
        attach(parameter, GradAccumulator(torch.zeros(parameter.shape, device=grid.device)))

    block = stage.blocks["0"]
    rotary, kernels = stage.rotary, engine.kernels
    assert stage.embedding is not None and rotary is not None, "one stage is the first and the last"

    def split(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.split(packed, rotary.cos, rotary.sin, rank.num_heads, rank.num_heads)

    return RankModules(
        stage=stage,
        embedding=stage.embedding,
        norm=block.attention_norm,
        activate=block.activate,
        split=split,
        attend=lambda q, k, v: kernels.attention(q, k, v, None),
        kernels=str(kernels),
        strict=engine.strict,
    )
