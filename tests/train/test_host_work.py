"""Host work of a training step: how many operators and calls a layer and a step may cost.

The limits are what was counted, and a tenth. Who needs more moves a limit, and says why.
"""

import torch

from k2train.launch.environment import Launch
from tests.support.gloo_pool import GlooPool
from tests.support.host_work import HostWork, host_work
from tests.support.tiny_model import engine_of, global_batch, grid_of, split, tiny_config

LIMITS = {
    # Forward and backward.
    "a micro-batch through a layer": HostWork(operators=173, calls=424),
    # Embedding, final norm, head, loss and executor.
    "a micro-batch": HostWork(operators=111, calls=199),
    # What a step does for a layer's nine tensors, however many micro-batches it has.
    "a step, for a layer": HostWork(operators=20, calls=60),
    # Gradients, decision, update and result.
    "a step": HostWork(operators=69, calls=182),
}
SIZES = ((1, 1), (3, 1), (1, 3), (3, 3))
"""Layers and micro-batches of the steps that are counted."""


def count_job(launch: Launch) -> list[tuple[int, ...]]:
    """Count a step of each of `SIZES`, on one thread."""
    torch.set_num_threads(1)
    return [tuple(counted(launch, *size)) for size in SIZES]


def counted(launch: Launch, layers: int, microbatches: int) -> HostWork:
    # Calls do not depend on the processor: OpenBLAS, which `auto` may take, is called from Python.
    config = tiny_config(
        model__num_layers=layers,
        batch__global_sequences=2 * microbatches,
        kernels__matmul="torch",
    )
    engine = engine_of(config, grid_of(launch, config))
    batch = split(config, global_batch(config, 0))
    engine.train_step(batch, 1e-3)
    return host_work(lambda: engine.train_step(batch, 1e-3))


def test_a_step_takes_no_more(pool: GlooPool) -> None:
    """Catches a loop over parameters in Python, or a check or a copy for every layer, that a step
    of a small model would feel and no comparison of numbers sees.
    """
    [counts] = pool.run(1, count_job)
    found: dict[str, dict[str, int]] = {}
    for of, values in zip(HostWork._fields, zip(*counts, strict=True), strict=True):
        few, deep, many, both = values
        inner = (both - deep - many + few) // 4
        microbatch, layer = (many - few) // 2 - inner, (deep - few) // 2 - inner
        found[of] = {
            "a micro-batch through a layer": inner,
            "a micro-batch": microbatch,
            "a step, for a layer": layer,
            "a step": few - inner - microbatch - layer,
        }

    over = {
        f"{of} of {part}": (count, LIMITS[part][index])
        for index, of in enumerate(HostWork._fields)
        for part, count in found[of].items()
        if count > LIMITS[part][index]
    }
    assert not over, f"more than the limit: {over}; found {found}"
