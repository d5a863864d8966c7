"""Symmetric-memory matmuls against torch's own unfused versions on gloo, and their refusal."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as torch_symmetric

from k2train.errors import ConfigError
from k2train.launch.environment import Launch
from k2train.parallel import collective_matmul, symmetric_memory
from k2train.parallel.collective_matmul import Product, Split, Symmetric
from k2train.parallel.grid import Axis, ProcessGrid
from k2train.parallel.symmetric_memory import (
    first_device,
    gather_multiply,
    multiply_scatter,
    require_symmetric_memory,
    symmetric_memory_problem,
)
from k2train.plan.layout import Layout
from tests.support.gloo_pool import GlooPool

UNFUSED = {
    "fused_all_gather_matmul": torch_symmetric._fused_all_gather_matmul_fallback,
    "fused_matmul_reduce_scatter": torch_symmetric._fused_matmul_reduce_scatter_fallback,
}


def symmetric_job(launch: Launch) -> list[bool]:
    """Both operations beside the plain ones: rows on this rank [4, 6] times [6, 5]."""
    axis = Axis("tp", launch.world_size, launch.rank, dist.group.WORLD)
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(5, 6, generator=generator).t()
    x = torch.randn(axis.size * 4, 6, generator=generator)
    plain, fused = Split(axis, Product()), Symmetric(replace(axis, symmetric=True), Product())
    kept = torch.ops.symm_mem

    class Operators:
        def __getattr__(self, name: str) -> Any:
            assert hasattr(kept, name), f"torch {torch.__version__} is without symm_mem.{name}"
            return UNFUSED[name]

    torch.ops.symm_mem = Operators()
    try:
        mine = x.chunk(axis.size)[axis.rank]
        pairs = list(
            zip(
                plain.gather_multiply(mine, matrix, False),
                fused.gather_multiply(mine, matrix, False),
                strict=True,
            )
        )
        own = x * (axis.rank + 1)
        pairs += [
            (
                plain.multiply_scatter(own, matrix, True).wait(),
                fused.multiply_scatter(own, matrix, True).wait(),
            )
        ]
        pairs += [(plain.gather(mine).wait(), fused.gather(mine).wait())]
    finally:
        torch.ops.symm_mem = kept

    return [a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs]


@pytest.mark.parametrize("size", (2, 4))
def test_fused_products_are_the_plain_ones(pool: GlooPool, size: int) -> None:
    """Catches arguments in the wrong order, a sum that is a mean, rows gathered along the wrong
    dimension.
    """
    assert pool.run(size, symmetric_job) == [[True] * 4] * size


def test_the_operators_take_what_we_give_them() -> None:
    """Catches a torch whose operators have other names or arguments: shapes only, on no device."""
    matrix = torch.empty(5, 6, device="meta").t()
    for name, given in (
        (
            "fused_all_gather_matmul",
            "Tensor A, Tensor[] Bs, int gather_dim, str group_name, *, bool return_A",
        ),
        (
            "fused_matmul_reduce_scatter",
            "Tensor A, Tensor B, str reduce_op, int scatter_dim, str group_name",
        ),
    ):
        assert given in str(getattr(torch.ops.symm_mem, name).default._schema)

    assert matrix.shape == (6, 5)
    assert collective_matmul.gather_multiply is gather_multiply
    assert collective_matmul.multiply_scatter is multiply_scatter


@pytest.mark.parametrize(
    ("ranks", "sequence", "plain", "message"),
    (
        (2, False, True, "parallel.sequence: true"),
        (2, True, False, "kernels.matmul: torch"),
        (
            8,
            True,
            True,
            "the 8 ranks of parallel.tensor on CUDA devices of one machine, 0 are visible",
        ),
    ),
)
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, ranks: int, sequence: bool, plain: bool, message: str
) -> None:
    """Catches a run that starts without what it was asked to use, and a refusal that does not say
    what to change.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    symmetric_memory_problem.cache_clear()
    axis = Axis("tp", ranks, 0, None, sequence=sequence)
    with pytest.raises(ConfigError, match=message) as refused:
        require_symmetric_memory(axis, plain)
    assert str(refused.value).startswith("parallel.symmetric_memory needs ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("reachable", (True, False))
def test_devices_must_read_each_other(monkeypatch: pytest.MonkeyPatch, reachable: bool) -> None:
    """Catches devices of one machine that do not reach each other, which would fail in the first
    product.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "can_device_access_peer", lambda a, b: reachable or (a, b) != (1, 0)
    )
    symmetric_memory_problem.cache_clear()
    axis = Axis("tp", 2, 1, None, sequence=True)

    if reachable:
        require_symmetric_memory(axis, True)
    else:
        with pytest.raises(ConfigError, match="CUDA device 1 cannot read 0"):
            require_symmetric_memory(axis, True)

    symmetric_memory_problem.cache_clear()


def test_only_the_ranks_of_the_axis_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two halves of a machine taken for connected, a pair refused because of another one,
    and ranks of two machines taken for those of one.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    # Two pairs: 0 and 1, 2 and 3.
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a // 2 == b // 2)
    found = {}
    for current, rank, ranks in ((0, 0, 2), (3, 1, 2), (2, 1, 2), (3, 3, 4), (0, 1, 2), (3, 0, 2)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=current: device)
        symmetric_memory_problem.cache_clear()
        problem = symmetric_memory_problem(ranks, True, True, first_device(rank))
        found[current, rank, ranks] = "" if problem is None else problem
    symmetric_memory_problem.cache_clear()

    assert not found[0, 0, 2] and not found[3, 1, 2]
    assert "CUDA device 1 cannot read 2" in found[2, 1, 2]
    assert "CUDA device 0 cannot read 2" in found[3, 3, 4]
    assert all("on CUDA devices of one machine" in found[key] for key in ((0, 1, 2), (3, 0, 2)))


def agreed_job(launch: Launch, reachable: tuple[bool, ...]) -> tuple[str, str]:
    """What `auto` finds on a rank whose device reads its peer's, or does not; then on a CPU."""
    grid = ProcessGrid(Layout(tensor=2, data=2), launch.rank, torch.device("cpu"))
    on_cpu = symmetric_memory.shared_problem(grid, True, True)
    grid.device = torch.device("cuda", launch.rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        patch.setattr(torch.cuda, "current_device", lambda: launch.rank)
        patch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: reachable[launch.rank])
        symmetric_memory_problem.cache_clear()
        found = symmetric_memory.shared_problem(grid, True, True)
    symmetric_memory_problem.cache_clear()
    return found, on_cpu


@pytest.mark.parametrize("reachable", ((True,) * 4, (True, True, False, True)), ids=str)
def test_all_ranks_decide_alike(pool: GlooPool, reachable: tuple[bool, ...]) -> None:
    """Catches ranks that choose by their own machine: two halves of a run with other numbers, or
    peers that wait for each other in different operators.
    """
    expected = "" if all(reachable) else "rank 2 needs devices that read each other's memory, "
    for found, on_cpu in pool.run(4, agreed_job, reachable):
        assert found == "" if not expected else found.startswith(expected)
        assert on_cpu == "2 ranks of parallel.tensor on cpu"
