"""Symmetric-memory matmuls against torch's own unfused versions on gloo, and their refusal."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as torch_symmetric

from k2train.errors import ConfigError
from k2train.launch.environment import Launch
from k2train.parallel import collective_matmul
from k2train.parallel.collective_matmul import Product, Split, Symmetric
from k2train.parallel.grid import Axis
from k2train.parallel.symmetric_memory import (
    gather_multiply,
    multiply_scatter,
    require_symmetric_memory,
)
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
    require_symmetric_memory.cache_clear()
    with pytest.raises(ConfigError, match=message) as refused:
        require_symmetric_memory(ranks, sequence, plain)
    assert str(refused.value).startswith("parallel.symmetric_memory needs ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("reachable", (True, False))
def test_devices_must_read_each_other(monkeypatch: pytest.MonkeyPatch, reachable: bool) -> None:
    """Catches devices of one machine that do not reach each other, which would fail in the first
    product.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "can_device_access_peer", lambda a, b: reachable or (a, b) != (1, 0)
    )
    require_symmetric_memory.cache_clear()

    if reachable:
        require_symmetric_memory(2, True, True)
    else:
        with pytest.raises(ConfigError, match="CUDA device 1 cannot read 0"):
            require_symmetric_memory(2, True, True)

    require_symmetric_memory.cache_clear()
