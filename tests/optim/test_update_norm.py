"""Norm of the applied update, on every kind of grid, against weights before and after.

Would catch a tensor that is counted twice or not at all, the decay left out, and an exchange in a
run that did not ask for the norm.
"""

from typing import Any

import numpy as np
import pytest

from k2train.launch.environment import Launch
from k2train.train.engine import StepResult
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import (
    assemble,
    engine_of,
    grid_of,
    local_gradients,
    microbatches_of,
    shapes_of,
    tiny_config,
)

RATE = 0.05
"""Large, so that fp32 weights hold the update to many digits."""


def steps_job(launch: Launch, config: Any) -> tuple[list[Any], list[StepResult]]:
    """Master weights of this rank before and after each of two steps, and the results."""
    engine = engine_of(config, grid_of(launch, config))
    weights, results = [], []
    for step in range(3):
        weights.append(local_gradients(engine, engine.optimizer.master))
        if step < 2:
            batch = microbatches_of(config, engine.grid, step)
            results.append(engine.train_step(batch, RATE))
    engine.optimizer.finish()
    return weights, results


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "kernel"),
    ((1, 1, 1, "auto"), (1, 1, 1, "reference"), (1, 1, 3, "auto"), (2, 2, 2, "auto")),
)
def test_it_is_the_distance_of_the_weights(
    pool: GlooPool, tp: int, pp: int, dp: int, kernel: str
) -> None:
    config = tiny_config(
        parallel__tensor=tp,
        parallel__pipeline=pp,
        kernels__optimizer=kernel,
        spikes__update_norm=True,
    )
    found = pool.run(tp * pp * dp, steps_job, config)
    shapes = shapes_of(config)
    weights = [assemble([part[0][n] for part in found], shapes) for n in range(3)]
    for step in range(2):
        before, after = weights[step], weights[step + 1]
        moved = sum(np.square(after[k].astype(np.float64) - before[k]).sum() for k in shapes)
        told = {part[1][step].update_norm for part in found}
        assert len(told) == 1, "every rank must decide from the same bits"
        assert told.pop() == pytest.approx(np.sqrt(moved), rel=1e-5)


def test_off_it_is_unknown_and_nothing_else_changes(pool: GlooPool) -> None:
    """Catches a norm that costs an exchange unasked, and one that disturbs the step."""
    off, on = (
        pool.run(2, steps_job, tiny_config(spikes__update_norm=asked)) for asked in (False, True)
    )
    assert [result.update_norm for result in off[0][1]] == [None, None]
    for (_, one), (_, other) in zip(off, on, strict=True):
        assert [(r.loss, r.grad_norm) for r in one] == [(r.loss, r.grad_norm) for r in other]


def skipped_job(launch: Launch, config: Any) -> StepResult:
    engine = engine_of(config, grid_of(launch, config))
    engine.optimizer.master.fill_(float("nan"))
    engine.optimizer.write_parameters()
    return engine.train_step(microbatches_of(config, engine.grid, 0), RATE)


def test_a_skipped_step_has_none_of_it(pool: GlooPool) -> None:
    result = pool.run(1, skipped_job, tiny_config(spikes__update_norm=True))[0]
    assert not result.applied and result.update_norm == 0.0
