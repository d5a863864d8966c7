"""Statistics of tensors after a step: true ones, and the same on every layout."""

import math
from typing import Any

import pytest
import torch

from k2train.launch.environment import Launch
from k2train.train.tensor_statistics import PARTS, TensorStatistics, tensor_statistics
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import engine_of, grid_of, microbatches_of, tiny_config

RATE = 1e-2


def statistics_job(launch: Launch, changes: dict[str, Any]) -> dict[str, Any]:
    """Three steps; the statistics after the last, and on one process what they should be."""
    config = tiny_config(**changes)
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    for step in (1, 2):
        engine.train_step(microbatches_of(config, grid, step), RATE)
    before = engine.optimizer.master.clone()

    reduced = []
    reduce = engine.gradients.reduce

    def keep() -> torch.Tensor:
        reduced.append(reduce().clone())
        return engine.gradients.shard

    engine.gradients.reduce = keep  # type: ignore[method-assign]
    result = engine.train_step(microbatches_of(config, grid, 3), RATE)
    found = tensor_statistics(engine, result, RATE)
    states = {
        "gradient": reduced[0],
        "weight": engine.optimizer.master,
        "exp_avg": engine.optimizer.exp_avg,
        "exp_avg_sq": engine.optimizer.exp_avg_sq,
        "update": before - engine.optimizer.master,
    }
    local = {
        slot.param_slice.name: {
            part: engine.gradients.shard_layout.local(state, slot).double()
            for part, state in states.items()
        }
        for slot in engine.gradients.shard_layout.slots
    }
    plain = {
        name: {
            part: (float(values.norm()), float(values.abs().max()), float((values == 0).sum()))
            for part, values in parts.items()
        }
        for name, parts in local.items()
    }
    return {"found": found, "plain": plain}


@pytest.fixture(scope="module")
def alone(pool: GlooPool) -> dict[str, Any]:
    (found,) = pool.run(1, statistics_job, {})
    return dict(found)


def test_they_are_what_the_state_holds(alone: dict[str, Any]) -> None:
    """Catches the gradient as clipping has left it, an update without its decay, and the moments
    of another step.
    """
    found: list[TensorStatistics] = alone["found"]
    assert {one.name for one in found} == set(alone["plain"])
    for one in found:
        assert tuple(one.parts) == PARTS
        for part, (norm, largest, zeros) in alone["plain"][one.name].items():
            got = one.parts[part]
            # The update is computed back in fp32: a difference of weights has few digits.
            close = 2e-3 if part == "update" else 1e-5
            assert math.isclose(got.norm, norm, rel_tol=close, abs_tol=1e-9), (one.name, part)
            assert math.isclose(got.max, largest, rel_tol=20 * close, abs_tol=1e-8), part
            assert part == "update" or got.zeros == pytest.approx(zeros / one.elements)
    # An id that no row holds has no gradient.
    embedding = next(one for one in found if one.name == "embedding.weight")
    assert embedding.parts["gradient"].zeros > 0


@pytest.mark.parametrize(
    ("world", "changes"),
    (
        (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
        (2, {"parallel__tensor": 1}),
    ),
)
def test_every_layout_finds_the_same(
    pool: GlooPool, alone: dict[str, Any], world: int, changes: dict[str, Any]
) -> None:
    """Catches a tensor counted by every rank that holds it, and one that its ranks only hold parts
    of.
    """
    first, *others = pool.run(world, statistics_job, changes)
    assert all(other["found"] == [] for other in others)
    for one, same in zip(alone["found"], first["found"], strict=True):
        assert (one.name, one.elements) == (same.name, same.elements)
        for part in PARTS:
            mine, theirs = one.parts[part], same.parts[part]
            assert math.isclose(mine.norm, theirs.norm, rel_tol=1e-3), (one.name, part)
            assert math.isclose(mine.max, theirs.max, rel_tol=2e-2), (one.name, part)
            assert mine.zeros == pytest.approx(theirs.zeros, abs=2 / one.elements)


def test_a_gradient_that_was_overwritten_is_not_made_up(
    pool: GlooPool, alone: dict[str, Any]
) -> None:
    """Catches the largest element and the zeros of the update, told as those of the gradient."""
    (asked,) = pool.run(1, statistics_job, {"spikes__update_norm": True})
    for one, same in zip(alone["found"], asked["found"], strict=True):
        gradient = same.parts["gradient"]
        assert gradient.norm == one.parts["gradient"].norm
        assert math.isnan(gradient.max) and math.isnan(gradient.zeros)
        assert same.parts["update"] == one.parts["update"]
