"""Shapes of a layout's products, against those that an engine computes."""

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from k2train.launch.environment import Launch
from k2train.model.kernels.product_choice import FORWARD, INPUT, WEIGHT, ProductShape
from k2train.parallel.collective_matmul import Product
from k2train.train.engine import Engine
from k2train.train.product_shapes import product_shapes, step_flops
from k2train.train.setup import Setup
from k2train.train.setup_kernels import kernels_of
from tests.support.gloo_pool import GlooPool
from tests.support.lanes import lanes
from tests.support.tiny_model import grid_of, microbatches_of, tiny_config

SMALL = {"model__vocab_size": 5, "parallel__tensor": 4, "model__num_kv_heads": 4}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"parallel__sequence": False}),
    "grouped queries": (1, {"parallel__sequence": False, "model__num_kv_heads": 2}),
    "tensor, replicated": (2, {"parallel__tensor": 2, "parallel__sequence": False}),
    "tensor, split": (2, {"parallel__tensor": 2}),
    "overlap": (2, {"parallel__tensor": 2, "parallel__overlap": "on"}),
    "overlap on 4": (4, {"parallel__tensor": 4, "parallel__overlap": "on"}),
    "a rank without vocabulary": (4, SMALL),
    "zero bubble": (2, {"parallel__pipeline": 2, "parallel__schedule": "zb-h1"}),
}


class Seen(Product):
    """Products that note their shapes and operations."""

    def __init__(self) -> None:
        self.shapes = set[ProductShape]()
        self.flops = 0

    def multiply(
        self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
    ) -> Tensor:
        (n, inner), outer = a.shape, matrix.shape[1]
        sizes = (INPUT, n, outer, inner) if gradient else (FORWARD, n, inner, outer)
        self._note(ProductShape(*sizes))
        return super().multiply(a, matrix, gradient, out)

    def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
        self._note(ProductShape(WEIGHT, x.shape[0], x.shape[1], dy.shape[1]))
        super().add_weight_gradient(into, dy, x)

    def _note(self, shape: ProductShape) -> None:
        if shape.flops:
            self.shapes.add(shape)
            self.flops += shape.flops


def seen_job(launch: Launch, changes: dict[str, Any]) -> tuple[list[str], int]:
    """Shapes of the products of a step, and their operations."""
    config, seen = tiny_config(**changes), Seen()
    grid = grid_of(launch, config)
    setup = Setup(config, grid.layout)
    kernels = replace(kernels_of(setup), product=seen)
    engine = Engine(setup, grid, kernels=kernels)
    engine.train_step(microbatches_of(config, grid, 1), 1e-3)
    return [str(shape) for shape in sorted(seen.shapes)], seen.flops


@pytest.mark.parametrize(*lanes("name", list(CASES), lambda name: name.startswith("overlap on")))
def test_the_listed_shapes_are_those_of_a_step(name: str, pool: GlooPool) -> None:
    """Catches a product that is measured and never computed, or computed and never measured, which
    keeps the default whatever the others gain.
    """
    world, changes = CASES[name]
    setup = Setup.of(tiny_config(**changes), world)
    found = pool.run(world, seen_job, changes)
    computed = {shape for shapes, _ in found for shape in shapes}
    assert {str(shape) for shape in product_shapes(setup)} == computed
    mean = sum(flops for _, flops in found) / world
    assert mean == pytest.approx(step_flops(setup)), "which decides whether anything is measured"


def test_a_last_strip_of_fewer_rows_is_listed() -> None:
    """Catches strips of the loss that do not divide the batch."""
    config = tiny_config(
        model__vocab_size=40000, data__sequence_length=130, batch__global_sequences=2
    )
    rows = {shape.n for shape in product_shapes(Setup.of(config, 1)) if shape.m == 40000}
    assert rows == {87, 86} and 2 * 130 == 2 * 87 + 86
