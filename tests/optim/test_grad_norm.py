"""Global gradient norm on every kind of grid, from gradients planted by global name."""

from math import fsum, inf, isfinite, nan, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k2train.launch.environment import Launch
from k2train.optim.grad_norm import (
    LARGEST_NORM,
    PIECE,
    SquareSums,
    StepSums,
    decide_step,
)
from k2train.parallel.grid import SINGLE, ProcessGrid
from k2train.parallel.shard import ParamSlice
from k2train.parallel.shard_layout import ShardLayout
from k2train.train.engine import Engine
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import engine_of, grid_of, shapes_of, tiny_config

GRIDS = (
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (1, 1, 3),
    (2, 2, 1),
    (4, 1, 2),
    (1, 4, 2),
    (2, 2, 2),
    (2, 1, 4),
)
NORMS = ("norm.weight", "layers.0.attention_norm.weight", "layers.3.mlp_norm.weight")


def planted(config: Any) -> dict[str, np.ndarray]:
    """Tensors of very different norms: one left out or counted twice must show."""
    rng = np.random.default_rng(11)
    shapes = shapes_of(config)
    return {
        name: (rng.standard_normal(shape) * (50.0 if name in NORMS else 1 + n % 7)).astype(
            np.float32
        )
        for n, (name, shape) in enumerate(shapes.items())
    }


def plant(engine: Engine, gradients: dict[str, np.ndarray]) -> torch.Tensor:
    """This rank's line of a known gradient, as the reduction would leave it."""
    shard_layout = engine.gradients.shard_layout
    shard = torch.zeros(shard_layout.elements)
    for slot in shard_layout.slots:
        value = torch.from_numpy(gradients[slot.param_slice.name])
        if slot.param_slice.dim is not None:
            value = value.narrow(
                slot.param_slice.dim,
                slot.param_slice.start,
                slot.param_slice.stop - slot.param_slice.start,
            )
        start, stop = slot.rows(engine.grid.dp)
        shard_layout.local(shard, slot).copy_(value[start:stop])

    return shard


def sums_of(engine: Engine, grid: ProcessGrid, shard: torch.Tensor) -> StepSums:
    loss = torch.tensor(0.25 if grid.rank == grid.layout.world_size - 1 else 0.0)
    return decide_step(
        engine.square_sums(shard), engine.names, loss, (1.0, float(grid.rank)), grid.stage, grid.pp
    ).read()


def norm_job(
    launch: Launch, config: Any
) -> tuple[float, dict[str, float], float, tuple[float, ...]]:
    grid = grid_of(launch, config)
    engine = engine_of(config, grid, fill=False)
    sums = sums_of(engine, grid, plant(engine, planted(config)))
    return sums.grad_norm, dict(sums.norms), sums.loss, sums.flags


def config_for(tp: int, pp: int, **changes: Any) -> Any:
    return tiny_config(parallel__tensor=tp, parallel__pipeline=pp, **changes)


@pytest.mark.parametrize("tp,pp,dp", GRIDS)
def test_norm_is_that_of_the_whole_gradient(pool: GlooPool, tp: int, pp: int, dp: int) -> None:
    """Catches a missing sum over stages or over a stage's ranks, replicas counted twice, a norm
    divided by micro-batches.
    """
    config, world = config_for(tp, pp), tp * pp * dp
    found = pool.run(world, norm_job, config)
    squares = {
        name: float(np.square(value, dtype=np.float64).sum())
        for name, value in planted(config).items()
    }
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
    """Plants one value in one tensor on one rank at a time; which of these the sums take for
    finite.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid, fill=False)
    missed = []

    for rank in range(launch.world_size):
        for n, name in enumerate(engine.names):
            value = (float("nan"), float("inf"), float("-inf"))[(n + rank) % 3]
            shard = plant(engine, planted(config))
            for slot in engine.gradients.shard_layout.slots:
                if grid.rank == rank and slot.param_slice.name == name:
                    held = engine.gradients.shard_layout.local(shard, slot)
                    held.view(-1)[-1:] = value

            holds = any(
                slot.param_slice.name == name
                and engine.gradients.shard_layout.local(shard, slot).numel()
                for slot in engine.gradients.shard_layout.slots
            )
            held_anywhere = torch.tensor([float(holds and grid.rank == rank)])
            torch.distributed.all_reduce(held_anywhere)
            if sums_of(engine, grid, shard).applied and held_anywhere.item():
                missed.append(f"{name} on rank {rank}")

    return missed


def test_one_value_that_is_not_finite_is_seen_everywhere(pool: GlooPool) -> None:
    """Catches a replica that nobody counts and so nobody checks: it alone would write NaN into one
    rank's weights.

    Each tensor of a layer a stage, on each of 8 ranks.
    """
    for missed in pool.run(8, not_finite_job, config_for(2, 2, model__num_layers=2)):
        assert missed == []


@given(st.floats(1e-6, 1e4), st.floats(1e-3, 1e3))
def test_the_divisor_is_torchs(norm: float, clip: float) -> None:
    """Catches a factor above 1 and a clip to another norm."""
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.tensor([norm * 0.6, norm * 0.8], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([parameter], clip)

    for clip_norm, expected in ((clip, parameter.grad[1].item()), (None, norm * 0.8)):
        sums = torch.tensor([(norm * 0.6) ** 2, (norm * 0.8) ** 2], dtype=torch.float64)
        decision = decide_step(
            sums, ["a", "b"], torch.tensor(0.5), (), SINGLE["stage"], SINGLE["pp"], clip_norm
        )
        assert norm * 0.8 / decision.divisor.item() == pytest.approx(expected, rel=1e-7)
        assert decision.divisor.item() >= 1.0
        assert decision.skip.item() == 0.0


@pytest.mark.parametrize(
    ("loss", "square", "skipped"),
    (
        (1.0, 4.0, False),
        (float("nan"), 4.0, True),
        (float("inf"), 4.0, True),
        (1.0, float("nan"), True),
    ),
)
def test_what_is_not_finite_is_skipped(loss: float, square: float, skipped: bool) -> None:
    """Catches a device that applies what the host calls skipped: weights and the count of updates
    would part.
    """
    sums = torch.tensor([1.0, square], dtype=torch.float64)
    decision = decide_step(
        sums, ["a", "b"], torch.tensor(loss), (0.0, 2.0), SINGLE["stage"], SINGLE["pp"], 1.0
    )
    assert bool(decision.skip) == skipped == (not decision.read().applied)
    assert decision.skip.dtype == decision.divisor.dtype == torch.float32, (
        "the fused kernel reads them as such"
    )
    assert decision.read().flags == (0.0, 2.0)


FP32_MAX = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("norm", "clip", "applied"),
    (
        (LARGEST_NORM, None, True),
        (LARGEST_NORM * 1.001, None, False),
        (FP32_MAX * 0.999, 1.0, True),
        (FP32_MAX * 1.001, 1.0, False),
        (FP32_MAX * 1e6, 1e9, True),
        (FP32_MAX * 0.002, 1e-3, False),
        (1e30, LARGEST_NORM * 2, False),
    ),
)
def test_a_gradient_that_cannot_be_used_is_skipped(
    norm: float, clip: float | None, applied: bool
) -> None:
    """Catches a divisor that is infinite in fp32, which turns every gradient into 0, and a second
    moment that becomes infinite for good.
    """
    sums = torch.tensor([norm**2, 0.0], dtype=torch.float64)
    decision = decide_step(
        sums, ["a", "b"], torch.tensor(1.0), (), SINGLE["stage"], SINGLE["pp"], clip
    )
    assert decision.read().applied == (not decision.skip.item()) == applied
    assert decision.read().grad_norm == pytest.approx(norm, rel=1e-12)

    # What is applied leaves moments that are finite, and a gradient of the norm that was asked for.
    clipped = norm / float(decision.divisor)
    if applied:
        assert isfinite(float(np.float32(clipped) * np.float32(clipped)))
        assert clipped == pytest.approx(min(norm, inf if clip is None else clip), rel=1e-6)


EDGES = (1e-45, 1e-40, 1e-30, 1e-23, 1e-10, 1.0, 1.8e19, 1e30, 3e38)
"""Magnitudes of fp32, from its smallest denormal to its end."""
OLD_BLOCKS = 65_536
"""From so many elements on squares were once added in fp32."""


def at_edge(magnitude: float, elements: int, seed: int) -> np.ndarray:
    """[elements] fp32 of about one magnitude and both signs; `nan` mixes all of them."""
    rng = np.random.default_rng(seed)
    of = rng.choice(EDGES, elements) if magnitude != magnitude else np.full(elements, magnitude)
    signs = rng.choice((-1.0, 1.0), elements)
    return np.asarray(of * signs * rng.uniform(0.9, 1.0, elements), dtype=np.float32)


def square_sum(values: np.ndarray) -> float:
    return fsum(np.square(values.reshape(-1), dtype=np.float64).tolist())


def square_sum_of_one(values: np.ndarray) -> float:
    """What `SquareSums` finds in a model of one tensor."""
    elements = len(values)
    shard_layout = ShardLayout(
        [
            (
                torch.nn.Parameter(torch.zeros(elements)),
                ParamSlice("a", (elements,), None, 0, elements, 0, None, True),
            )
        ],
        SINGLE["dp"],
    )
    shard = torch.zeros(shard_layout.elements)
    shard_layout.local(shard, shard_layout.slots[0]).copy_(torch.from_numpy(values))
    sums = SquareSums(shard_layout, ["other", "a"], SINGLE["tp"], torch.device("cpu"))(shard)
    assert sums[0] == 0.0
    return sums[1].item()


@pytest.mark.parametrize("magnitude", (*EDGES, nan))
@pytest.mark.parametrize(
    "elements",
    (
        *(1, 255, OLD_BLOCKS - 1, OLD_BLOCKS, OLD_BLOCKS + 1),
        *(PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 77),
    ),
)
def test_squares_are_those_of_fp64(magnitude: float, elements: int) -> None:
    """Catches squares in fp32, which overflow, vanish or lose the seventh digit, from some size on;
    and a piece that is left out or counted twice.
    """
    values = at_edge(magnitude, elements, elements)
    assert square_sum_of_one(values) == pytest.approx(square_sum(values), rel=1e-13, abs=0.0)


WIDE: dict[str, Any] = {"model__vocab_size": 2 * OLD_BLOCKS // 32, "model__hidden_size": 32}
"""Embedding and head exceed that size on one process, and not on four."""


def edge_gradient(config: Any, magnitude: float) -> dict[str, np.ndarray]:
    return {
        name: at_edge(magnitude, int(np.prod(shape)), n).reshape(shape)
        for n, (name, shape) in enumerate(shapes_of(config).items())
    }


def edge_job(launch: Launch, config: Any, magnitudes: list[float]) -> list[tuple[Any, ...]]:
    """Norm, norms, decision and divisor of each magnitude."""
    grid = grid_of(launch, config)
    engine = engine_of(config, grid, fill=False)
    found = []

    for magnitude in magnitudes:
        shard = plant(engine, edge_gradient(config, magnitude))
        loss = torch.tensor(0.0)
        decision = decide_step(
            engine.square_sums(shard), engine.names, loss, (), grid.stage, grid.pp, 1.0
        )
        sums = decision.read()
        found.append((sums.grad_norm, dict(sums.norms), sums.applied, decision.divisor.item()))

    return found


@pytest.mark.parametrize("tp,pp,dp", ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 4)))
def test_every_layout_decides_alike_at_the_edges(pool: GlooPool, tp: int, pp: int, dp: int) -> None:
    """Catches a range that depends on the size of a rank's part: one layout would skip the step
    that another applies.
    """
    config = config_for(tp, pp, **WIDE)
    assert any(np.prod(shape) >= 2 * OLD_BLOCKS for shape in shapes_of(config).values())
    magnitudes = [*EDGES, nan]
    found = pool.run(tp * pp * dp, edge_job, config, magnitudes)
    assert all(part == found[0] for part in found), "ranks disagree"

    for magnitude, (norm, norms, applied, divisor) in zip(magnitudes, found[0], strict=True):
        squares = {k: square_sum(v) for k, v in edge_gradient(config, magnitude).items()}
        expected = sqrt(fsum(squares.values()))
        assert norm == pytest.approx(expected, rel=1e-12, abs=0.0)
        assert norms == pytest.approx({k: sqrt(v) for k, v in squares.items()}, rel=1e-12, abs=0.0)
        # Clipped to 1: only what no fp32 divisor can clip is skipped.
        assert applied == (expected < FP32_MAX)
        if applied:
            assert divisor == pytest.approx(max(1.0, expected + 1e-6), rel=1e-6)
