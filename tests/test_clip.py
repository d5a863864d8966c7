"""The global norm on every kind of grid, from gradients planted by global name."""

from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gloo import GlooPool
from k2train.engine import Engine
from k2train.optim.clip import StepSums, agree, clip_scale, square_sums
from k2train.parallel.environment import Launch
from k2train.parallel.grid import ProcessGrid
from small import grid_of, shapes_of, tiny_config

GRIDS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 3), (2, 2, 1), (4, 1, 2), (1, 4, 2), (2, 2, 2), (2, 1, 4))
NORMS = ("norm.weight", "layers.0.attention_norm.weight", "layers.3.mlp_norm.weight")


def planted(config: Any) -> dict[str, np.ndarray]:
    """Tensors of very different norms: one left out or counted twice must show."""
    rng = np.random.default_rng(11)
    shapes = shapes_of(config)
    return {
        name: (rng.standard_normal(shape) * (50.0 if name in NORMS else 1 + n % 7)).astype(np.float32)
        for n, (name, shape) in enumerate(shapes.items())
    }


def plant(engine: Engine, gradients: dict[str, np.ndarray]) -> torch.Tensor:
    """This rank's line of a known gradient, as the reduction would leave it."""
    table = engine.gradients.table
    line = torch.zeros(table.elements)
    for slot in table.slots:
        value = torch.from_numpy(gradients[slot.piece.name])
        if slot.piece.dim is not None:
            value = value.narrow(slot.piece.dim, slot.piece.start, slot.piece.stop - slot.piece.start)
        start, stop = slot.rows(engine.grid.dp)
        table.local(line, slot).copy_(value[start:stop])
    return line


def sums_of(engine: Engine, grid: ProcessGrid, line: torch.Tensor) -> StepSums:
    loss = torch.tensor(0.25 if grid.rank == grid.layout.world_size - 1 else 0.0)
    sums = square_sums(engine.gradients.table, line, engine.names, grid.tp)
    return agree(sums, engine.names, loss, (1.0, float(grid.rank)), grid.stage, grid.pp)


def norm_job(launch: Launch, config: Any) -> tuple[float, dict[str, float], float, tuple[float, ...]]:
    grid = grid_of(launch, config)
    engine = Engine(config, grid, fill=False)
    sums = sums_of(engine, grid, plant(engine, planted(config)))
    return sums.grad_norm, dict(sums.norms), sums.loss, sums.flags


def config_for(tp: int, pp: int, **changes: Any) -> Any:
    return tiny_config(parallel__tensor=tp, parallel__pipeline=pp, **changes)


@pytest.mark.parametrize("tp,pp,dp", GRIDS)
def test_norm_is_that_of_the_whole_gradient(pool: GlooPool, tp: int, pp: int, dp: int) -> None:
    """Catches a missing sum over stages or over a stage's ranks, replicas counted twice, a norm divided by micro-batches."""
    config, world = config_for(tp, pp), tp * pp * dp
    found = pool.run(world, norm_job, config)
    squares = {name: float(np.square(value, dtype=np.float64).sum()) for name, value in planted(config).items()}
    assert all(part == found[0] for part in found), "ranks disagree"
    norm, norms, loss, flags = found[0]
    assert norm == pytest.approx(sqrt(sum(squares.values())), rel=1e-12)
    assert norms == pytest.approx({name: sqrt(value) for name, value in squares.items()}, rel=1e-12)
    assert (loss, flags) == (0.25, (float(world), world * (world - 1) / 2))


def test_norm_does_not_change_a_bit_with_the_pipeline(pool: GlooPool) -> None:
    """Catches a sum in the order of stages: pipeline degrees would then clip differently."""
    norms = {pool.run(pp, norm_job, config_for(1, pp))[0][0] for pp in (1, 2, 4)}
    assert len(norms) == 1


def not_finite_job(launch: Launch, config: Any) -> list[str]:
    """Plants one value in one tensor on one rank at a time; which of these the sums take for finite."""
    grid = grid_of(launch, config)
    engine = Engine(config, grid, fill=False)
    missed = []
    for rank in range(launch.world_size):
        for n, name in enumerate(engine.names):
            value = (float("nan"), float("inf"), float("-inf"))[(n + rank) % 3]
            line = plant(engine, planted(config))
            for slot in engine.gradients.table.slots:
                if grid.rank == rank and slot.piece.name == name:
                    held = engine.gradients.table.local(line, slot)
                    held.view(-1)[-1:] = value
            holds = any(
                slot.piece.name == name and engine.gradients.table.local(line, slot).numel()
                for slot in engine.gradients.table.slots
            )
            held_anywhere = torch.tensor([float(holds and grid.rank == rank)])
            torch.distributed.all_reduce(held_anywhere)
            if sums_of(engine, grid, line).finite and held_anywhere.item():
                missed.append(f"{name} on rank {rank}")
    return missed


def test_one_value_that_is_not_finite_is_seen_everywhere(pool: GlooPool) -> None:
    """Catches a replica that nobody counts and so nobody checks: it alone would write NaN into one rank's weights."""
    for missed in pool.run(8, not_finite_job, config_for(2, 2)):
        assert missed == []


@given(st.floats(1e-6, 1e4), st.floats(1e-3, 1e3))
def test_clip_scale_is_torchs(norm: float, clip: float) -> None:
    """Catches a factor above 1 and a clip to another norm."""
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.tensor([norm * 0.6, norm * 0.8], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([parameter], clip)
    assert clip_scale(norm, clip) * norm * 0.8 == pytest.approx(parameter.grad[1].item(), rel=1e-12)
    assert clip_scale(norm, None) == 1.0
