"""Kernels of a setup: what the line of a run says about choices that decide over bits."""

import torch

from k2train.launch.environment import Launch
from k2train.model.kernels.select import choose_kernels
from k2train.parallel.grid import ProcessGrid
from k2train.plan.layout import Layout
from k2train.train.setup import Setup
from k2train.train.setup_kernels import kernels_of, other_kernels
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import tiny_config


def test_the_kernels_line_says_how_gradients_are_added() -> None:
    """Catches a choice that decides over bits and is in no line, and so in no signature."""
    told = {
        choice: str(kernels_of(Setup.of(tiny_config(**choice_of(*choice)), 1)))
        for choice in (("fp32", "torch"), ("bf16", "torch"), ("fp32", "onednn"))
    }
    assert ", gradients fp32 in place, deterministic on" in told["fp32", "torch"]
    assert ", gradients rounded, deterministic on" in told["bf16", "torch"]
    assert ", gradients fp32 in two steps, deterministic on" in told["fp32", "onednn"]


def choice_of(precision: str, matmul: str) -> dict[str, str]:
    return {"precision": precision, "kernels__matmul": matmul}


def compared_job(launch: Launch, attention: tuple[str, ...]) -> str:
    """What the ranks say of kernels whose attention is that of each rank."""
    grid = ProcessGrid(Layout(data=3), launch.rank, torch.device("cpu"))
    return other_kernels(grid, choose_kernels(attention=attention[launch.rank]))


def test_a_rank_with_other_kernels_is_told(pool: GlooPool) -> None:
    """Catches a machine that lacks a package, whose ranks take another kernel without a word: the
    kernels line is rank 0's.
    """
    assert pool.run(3, compared_job, ("plain",) * 3) == [""] * 3
    (told,) = {*pool.run(3, compared_job, ("plain", "plain", "sdpa"))}
    assert told.startswith("rank 2 has other kernels than rank 0 (attention sdpa): bits depend on ")
