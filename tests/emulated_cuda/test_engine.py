"""Training steps under emulated CUDA, beside the same steps on the CPU.

Would catch a tensor made on the wrong device, an operation with no CUDA kernel, a branch for CUDA
that computes something else, and a step in which the host waits for the device.
"""

from typing import Any

import numpy as np
import pytest

from tests.emulated_cuda.jobs import Trained, careless_job, engine_job
from tests.support.gloo_pool import GlooPool

FP32: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"model__num_kv_heads": 2, "kernels__recompute": "selective"},
    "recompute": {"kernels__recompute": "full", "kernels__loss": "reference"},
    "zero-bubble": {"parallel__schedule": "zb-h1", "kernels__norm": "torch"},
    "documents": {"data__cross_documents": "block"},
    "reference": {
        "kernels__attention": "reference",
        "kernels__norm": "reference",
        "kernels__elementwise": "reference",
        "kernels__optimizer": "reference",
    },
}
BF16 = {"precision": "bf16"}
READ = "optim/grad_norm.py:"
"""File of the only line in a step at which the host waits."""


def trained(pool: GlooPool, device: str, **changes: Any) -> Trained:
    (found,) = pool.run(1, engine_job, device, changes)
    assert isinstance(found, Trained)
    return found


def waits_once(found: Trained) -> bool:
    """Whether the host waited once in a step, where it reads what was decided."""
    return sum(found.waits.values()) == 1 and all(READ in where for where in found.waits)


@pytest.mark.parametrize("case", sorted(FP32))
def test_fp32_steps_are_those_of_the_cpu(cuda_pool: GlooPool, case: str) -> None:
    """Within fp32 rounding: sums in another order, 2^-24 each, over a model of 4 layers."""
    cpu, cuda = (trained(cuda_pool, device, **FP32[case]) for device in ("cpu", "cuda"))
    assert cuda.losses == pytest.approx(cpu.losses, rel=1e-6)
    assert cuda.norms == pytest.approx(cpu.norms, rel=2e-6)
    assert cuda.held_out == pytest.approx(cpu.held_out, rel=1e-6)
    weights, wanted = (np.frombuffer(one.weights, dtype=np.float32) for one in (cuda, cpu))
    # A step moves a weight by at most about the learning rate, 1e-3.
    assert np.abs(weights - wanted).max() < 3e-6
    assert waits_once(cuda), cuda.waits
    assert all(cuda.applied) and not cpu.waits


@pytest.mark.parametrize("attention", ("auto", "flash", "sdpa", "reference"))
def test_bf16_steps_are_those_of_the_cpu(cuda_pool: GlooPool, attention: str) -> None:
    """Within bf16 rounding, 2^-9 for every activation; losses are means over 112 tokens."""
    cpu = trained(cuda_pool, "cpu", **BF16)
    cuda = trained(cuda_pool, "cuda", **BF16, kernels__attention=attention)
    assert cuda.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert cuda.norms == pytest.approx(cpu.norms, rel=1e-2)
    assert cuda.losses != cpu.losses, "the same kernels have run"
    assert waits_once(cuda), cuda.waits


WITHIN: dict[str, tuple[str, dict[str, Any]]] = {
    "auto": ("varlen", {}),
    "flash grouped": (
        "varlen",
        {
            "kernels__attention": "flash",
            "model__num_kv_heads": 2,
            "kernels__recompute": "selective",
        },
    ),
    "sdpa": ("masked", {"kernels__attention": "sdpa"}),
}


@pytest.mark.parametrize("case", sorted(WITHIN))
def test_bf16_steps_within_documents_are_those_of_the_cpu(cuda_pool: GlooPool, case: str) -> None:
    """Within bf16 rounding, as above. The CPU has packed documents, a device takes their borders.

    Catches borders of other rows, and lengths that the host asks the device for.
    """
    method, changes = WITHIN[case]
    both = {**BF16, "data__cross_documents": "block", **changes}
    cpu = trained(cuda_pool, "cpu", **{**both, "kernels__attention": "auto"})
    cuda = trained(cuda_pool, "cuda", **both)
    assert f"documents {method}" in cuda.kernels and "documents packed" in cpu.kernels
    assert cuda.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert cuda.norms == pytest.approx(cpu.norms, rel=1e-2)
    assert cuda.held_out == pytest.approx(cpu.held_out, rel=3e-3)
    assert cuda.losses != cpu.losses, "the same kernels have run"
    assert waits_once(cuda), cuda.waits

    attend = trained(cuda_pool, "cuda", **{**both, "data__cross_documents": "attend"})
    assert attend.norms != pytest.approx(cpu.norms, rel=2e-2), "borders change nothing to see"


def test_recompute_changes_no_bit(cuda_pool: GlooPool) -> None:
    """Catches a layer that computes another thing when it computes it again."""
    kept = trained(cuda_pool, "cuda", **BF16)
    for policy in ("selective", "full"):
        again = trained(cuda_pool, "cuda", **BF16, kernels__recompute=policy)
        assert (again.losses, again.weights) == (kept.losses, kept.weights), policy


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_a_device_digest_is_that_of_the_host(cuda_pool: GlooPool, precision: str) -> None:
    """Catches sums of the digest that depend on the device's blocks."""
    cuda = trained(cuda_pool, "cuda", precision=precision)
    assert cuda.digest == cuda.host_digest
    assert cuda.digest != trained(cuda_pool, "cpu", precision=precision).digest, "another state"


def test_a_read_inside_the_step_is_named(cuda_pool: GlooPool) -> None:
    """Catches a count that stays at one when somebody adds `.item()` to the step."""
    ((usual, careless),) = cuda_pool.run(1, careless_job)
    assert sum(usual.values()) == 1
    (added,) = set(careless) - set(usual)
    assert added.startswith("read (aten::_local_scalar_dense) at train/engine.py:")
    assert sum(careless.values()) == 2
