"""bf16 products upcast to fp32: exact but for one rounding, and only where bf16 is emulated."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from k2train.errors import ConfigError
from k2train.model.kernels.product_choice import LIBRARIES, product_of
from k2train.model.kernels.select import DeviceTraits, choose_kernels
from k2train.model.kernels.upcast import (
    UpcastProduct,
    upcast_flash_attention,
    upcast_plain_attention,
    upcast_product,
)
from k2train.parallel.collective_matmul import Product
from k2train.parallel.grad_accumulation import IN_PLACE
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import tiny_config, train_job

CPU = torch.device("cpu")
ROUNDING = 2.0**-8


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_product_is_rounded_once(library: str) -> None:
    """Catches sums in bf16, a transposed factor, a lost `out`, a rounded weight gradient."""
    torch.manual_seed(0)
    a, weight, dy = (torch.randn(n, k).bfloat16() for n, k in ((96, 64), (160, 64), (96, 160)))
    product, room = UpcastProduct(product_of(library)), torch.full((98, 160), 7.0).bfloat16()

    exact = a.double() @ weight.double().t()
    terms = a.double().abs() @ weight.double().abs().t()
    for found in (
        product.multiply(a, weight.t(), gradient=False),
        product.multiply(a, weight.t(), gradient=False, out=room[1:97]),
        room[1:97],
    ):
        assert found.dtype == torch.bfloat16
        assert ((found.double() - exact).abs() <= ROUNDING * exact.abs() + 1e-6 * terms).all()
    assert (room[0] == 7.0).all() and (room[-1] == 7.0).all()

    total, gradient = torch.ones(160, 64), dy.double().t() @ a.double()
    product.add_weight_gradient(total, dy, a)
    sizes = 1.0 + dy.double().abs().t() @ a.double().abs()
    assert ((total.double() - 1.0 - gradient).abs() <= 1e-6 * sizes).all()
    assert UpcastProduct(Product()).gradient_sums(CPU, torch.bfloat16) == IN_PLACE


def test_auto_is_upcast_where_bf16_is_emulated() -> None:
    """Catches a run that is six times slower than fp32, and one upcast where it need not be."""
    emulated = DeviceTraits(CPU, torch.bfloat16, sequence_length=64, emulates_bf16=True)
    kernels = choose_kernels(traits=emulated)
    assert kernels.matmul == "upcast" and isinstance(kernels.product, UpcastProduct)
    assert kernels.attention is upcast_plain_attention
    long = choose_kernels(traits=replace(emulated, sequence_length=1 << 14))
    assert long.attention is upcast_flash_attention

    for other in (replace(emulated, emulates_bf16=False), replace(emulated, dtype=torch.float32)):
        assert choose_kernels(traits=other).matmul != "upcast"
    assert choose_kernels(matmul="torch", traits=emulated).product is None


def test_it_is_for_bf16_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="is for a CPU, and this is cuda: choose auto"):
        upcast_product(torch.device("cuda"), torch.bfloat16)
    with pytest.raises(ConfigError, match="is for precision bf16"):
        choose_kernels(matmul="upcast")


def test_steps_equal_those_of_bf16_instructions(pool: GlooPool) -> None:
    """Catches a product of the model that is left out or computed twice, on every layout."""

    def losses(product: str, **layout: Any) -> list[float]:
        config = tiny_config(precision="bf16", kernels__matmul=product, **layout)
        world = config.parallel.tensor * config.parallel.pipeline
        return [loss for loss, *_ in pool.run(world, train_job, config, 3)[0]["results"]]

    instructions = losses("torch")
    for layout in ({}, {"parallel__tensor": 2}, {"parallel__pipeline": 2}):
        assert losses("upcast", **layout) == pytest.approx(instructions, rel=3e-3), layout
