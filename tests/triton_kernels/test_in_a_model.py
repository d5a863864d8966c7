"""Training steps with all Triton kernels, in the interpreter: numbers, bits and memory."""

import gc
from typing import Any

import numpy as np
import pytest

from k2train.config.load import Config
from k2train.launch.environment import Launch
from tests.plan.test_memory import peaks_job
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import assemble, shapes_of, tiny_config, train_job

KERNELS = {f"kernels__{key}": "triton" for key in ("norm", "elementwise", "loss", "optimizer")}
# The interpreter takes a millisecond a program, so few tokens.
SMALL = {
    "model__num_layers": 2,
    "model__num_kv_heads": 2,
    "data__sequence_length": 8,
    "batch__global_sequences": 2,
    "batch__micro_sequences": 1,
}
STEPS = 2


def interpreted_job(launch: Launch, config: Config) -> Any:
    from tests.support.triton_interpreter import ready

    ready()
    return train_job(launch, config, STEPS)


def run(pool: GlooPool, world: int, **changes: Any) -> Any:
    config = tiny_config(**SMALL, **changes)
    parts = pool.run(world, interpreted_job, config)
    return parts[0]["results"], assemble([part["weights"] for part in parts], shapes_of(config))


@pytest.fixture(scope="module")
def alone(interpreter: GlooPool) -> Any:
    """Losses and weights of one process with all Triton kernels."""
    return run(interpreter, 1, **KERNELS)


def test_they_train_as_torchs_do(interpreter: GlooPool, alone: Any) -> None:
    """Catches a kernel that is right by itself and wired to something else: a residual added twice,
    a norm of the wrong weight, an update of other weights than the layers read.
    """
    plain = run(interpreter, 1)
    assert np.allclose(plain[0], alone[0], rtol=2e-6, atol=0)
    for name, value in plain[1].items():
        assert np.abs(value - alone[1][name]).max() <= 1e-5 * np.abs(value).max(), name


@pytest.mark.parametrize(
    ("world", "changes"),
    (
        (1, {"kernels__recompute": "selective"}),
        (1, {"kernels__recompute": "full"}),
        (2, {"parallel__pipeline": 2, "kernels__recompute": "selective"}),
    ),
    ids=str,
)
def test_recompute_and_stages_change_no_bit(
    interpreter: GlooPool, alone: Any, world: int, changes: dict[str, Any]
) -> None:
    """Catches a sum and norm whose parts differ when they are computed apart: by a layer that
    computes its norm again, or at the border of a stage.
    """
    found = run(interpreter, world, **KERNELS, **changes)
    assert found[0] == alone[0]
    for name, value in alone[1].items():
        assert np.array_equal(value, found[1][name]), name


def test_tensor_parallel_ranks_train_alike(interpreter: GlooPool, alone: Any) -> None:
    """Catches a weight gradient of the norm that is not summed over the parts of a sequence, and a
    softmax of a part of the columns taken for the whole.
    """
    found = run(interpreter, 2, **KERNELS, parallel__tensor=2)
    assert np.allclose(found[0], alone[0], rtol=2e-6, atol=0)
    for name, value in alone[1].items():
        assert np.abs(value - found[1][name]).max() <= 1e-5 * np.abs(value).max(), name


def peaks_interpreted_job(launch: Launch, configs: list[Config]) -> list[tuple[str, float]]:
    from triton.runtime.interpreter import GridExecutor

    from tests.support.triton_interpreter import ready

    ready()
    call = GridExecutor.__call__

    def called(self: Any, *args: Any, **kwargs: Any) -> None:
        call(self, *args, **kwargs)
        # The interpreter's own references to the tensors form cycles, which would count as held.
        gc.collect()

    gc.collect()
    gc.freeze()
    GridExecutor.__call__ = called
    try:
        return peaks_job(launch, configs)
    finally:
        GridExecutor.__call__ = call
        gc.unfreeze()


def test_the_fullest_moment_is_planned(interpreter: GlooPool) -> None:
    """Catches a kernel that keeps more than the plan counts: a sum besides its parts, an fp32 copy,
    the packed queries behind the split ones.
    """
    shape = {
        "data__sequence_length": 32,
        "batch__micro_sequences": 1,
        "model__num_layers": 2,
        "model__hidden_size": 64,
        "model__ffn_hidden_size": 176,
        "kernels__attention": "sdpa",
        # As on a GPU: `auto` upcasts on CPUs without bf16, which has its own test.
        "kernels__matmul": "torch",
    }
    configs = [
        tiny_config(kernels__recompute=policy, precision="bf16", **shape, **KERNELS)
        for policy in ("none", "selective", "full")
    ]
    (found,) = interpreter.run(1, peaks_interpreted_job, configs)
    # As the torch kernels at this size: the plan is up to 4 % above what is held.
    assert not [pair for pair in found if not 0.94 <= pair[1] <= 1.01], found
