"""Four processes under emulated CUDA, each with a device of its own, beside one process.

Would catch a collective on the wrong device or group, a tensor that is used before it has arrived,
and a fault on purpose that strikes another tensor, rank or step than it names.
"""

from typing import Any

import pytest

from tests.emulated_cuda.jobs import Trained, engine_job
from tests.emulated_cuda.test_engine import waits_once
from tests.support.gloo_pool import GlooPool
from tests.support.sent_gradients import check_struck, sent_job

OVERLAP: dict[str, Any] = {"parallel__overlap": "on", "parallel__bucket_bytes": 1000}
WORLDS: dict[str, dict[str, Any]] = {
    "tp2 pp2": {
        **OVERLAP,
        "parallel__tensor": 2,
        "parallel__pipeline": 2,
        "parallel__gathered": "again",
    },
    "pp2 dp2": {**OVERLAP, "parallel__pipeline": 2, "parallel__schedule": "zb-h1"},
    "tp2 dp2": {**OVERLAP, "parallel__tensor": 2, "kernels__recompute": "full"},
}


def trained(pool: GlooPool, world: int, device: str = "cuda", **changes: Any) -> list[Trained]:
    found: list[Trained] = pool.run(world, engine_job, device, changes)
    for rank in found:
        assert (rank.losses, rank.norms, rank.applied) == (
            found[0].losses,
            found[0].norms,
            found[0].applied,
        ), "all ranks decide alike"
    return found


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_a_world_of_four_trains_as_one_process(cuda_pool: GlooPool, world: str) -> None:
    """Within fp32 rounding of sums over ranks, and the same as on the CPU in the same layout."""
    alone = trained(cuda_pool, 1)[0]
    found = trained(cuda_pool, 4, **WORLDS[world])
    assert found[0].losses == pytest.approx(alone.losses, rel=1e-6)
    assert found[0].norms == pytest.approx(alone.norms, rel=2e-6)
    assert found[0].held_out == pytest.approx(alone.held_out, rel=1e-6)
    for rank in found:
        assert waits_once(rank), rank.waits
        assert rank.digest == rank.host_digest

    cpu = trained(cuda_pool, 4, device="cpu", **WORLDS[world])[0]
    assert found[0].losses == pytest.approx(cpu.losses, rel=1e-6)


def test_two_tensor_ranks_stop_at_the_borders_of_one(cuda_pool: GlooPool) -> None:
    """Within bf16 rounding, 2^-9 for every activation. Catches borders that a rank counts itself,
    and a shape of a rank's heads that the kernel for documents does not take.
    """
    changes = {"precision": "bf16", "data__cross_documents": "block"}
    alone = trained(cuda_pool, 1, device="cpu", **changes)[0]
    found = trained(cuda_pool, 2, **changes, parallel__tensor=2)
    assert found[0].losses == pytest.approx(alone.losses, rel=1e-3)
    assert found[0].norms == pytest.approx(alone.norms, rel=1e-2)
    for rank in found:
        assert "documents varlen" in rank.kernels
        assert waits_once(rank), rank.waits


STRUCK = (
    ("pp2 dp2", 0, 2, "huge", "layers.0.mlp.gate.weight"),
    ("pp2 dp2", 3, 3, "nan", "norm.weight"),
    ("tp2 dp2", 1, 2, "inf", "layers.3.attention.query.weight"),
)


@pytest.mark.parametrize(("world", "rank", "step", "action", "tensor"), STRUCK)
def test_a_gradient_fault_strikes_what_it_names(
    cuda_pool: GlooPool, world: str, rank: int, step: int, action: str, tensor: str
) -> None:
    """Catches a gradient changed on another rank, tensor or step, or after its bucket has left."""
    fault = f"gradient@rank={rank}@step={step}:{action}={tensor}"
    faulty, sound = (
        cuda_pool.run(4, sent_job, WORLDS[world], text, tensor, "cuda") for text in (fault, "")
    )
    check_struck(faulty, sound, rank, step, action, tensor)
