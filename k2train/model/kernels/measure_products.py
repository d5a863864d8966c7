"""Measurement of matrix products by library, and the choice that follows from it.

- Every library computes every shape once in each round, in turns, so noise hits all alike.
- Another library is taken where it is at least `GAIN` faster, by its fastest round and by the
  median over rounds of its ratio to the other one: one of the two alone is noise more often.
- A product has the strides of a layer's. Large ones are measured with fewer rows.
- Inputs rotate over copies: one would stay in the innermost cache.

Alternatives considered:
- The fastest library wherever it is faster: with nothing to gain, the choice would follow noise,
  and two fresh runs would differ in their bits for nothing.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from k2train.model.kernels.product_choice import (
    FORWARD,
    LIBRARIES,
    WEIGHT,
    ProductShape,
    product_of,
)
from k2train.parallel.collective_matmul import Product

GAIN = 1.1
"""How much faster another library must be."""
BUDGET_SECONDS = 1.5
"""Of all rounds; a round that began is finished."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 15
MEASURED_FLOPS = 3e8
"""Of one product: about 5 ms. More rows tell nothing new."""
LEAST_ROWS = 64
COPIES = 3

Seconds = dict[ProductShape, dict[str, list[float]]]
"""Seconds of each round by shape and library."""
Clock = Callable[[], float]


def measure_products(
    shapes: Sequence[ProductShape],
    libraries: Sequence[str],
    budget_seconds: float = BUDGET_SECONDS,
    clock: Clock = time.perf_counter,
) -> Seconds:
    """Measure products of fp32 on this CPU, all shapes by all libraries in turns."""
    products = {name: product_of(name) for name in libraries}
    work = {shape: _Work(measured_shape(shape)) for shape in shapes}
    seconds: Seconds = {shape: {name: [] for name in libraries} for shape in shapes}
    began = clock()
    for turn in range(1 + MOST_ROUNDS):
        if turn > LEAST_ROUNDS and clock() - began > budget_seconds:
            break
        for shape, one in work.items():
            for number in range(len(libraries)):
                # Every turn begins with another library: the first finds other caches.
                name = libraries[(number + turn) % len(libraries)]
                before = clock()
                one.run(products[name], turn)
                # The first turn is for packages that prepare kernels.
                if turn:
                    seconds[shape][name].append(clock() - before)
    return seconds


def measured_shape(shape: ProductShape) -> ProductShape:
    """Return the shape with as many rows as are worth their time."""
    most = max(LEAST_ROWS, int(MEASURED_FLOPS / max(1, 2 * shape.k * shape.m)))
    return shape._replace(n=min(shape.n, most))


class _Work:
    """Factors of one product, in the strides of a layer."""

    def __init__(self, shape: ProductShape):
        self.kind = shape.kind
        generator = torch.Generator().manual_seed(1)

        def drawn(rows: int, columns: int) -> list[torch.Tensor]:
            return [torch.randn(rows, columns, generator=generator) for _ in range(COPIES)]

        self.x, self.dy = drawn(shape.n, shape.k), drawn(shape.n, shape.m)
        self.weight = drawn(shape.m, shape.k)

    def run(self, product: Product, turn: int) -> None:
        index = turn % COPIES
        x, dy, weight = self.x[index], self.dy[index], self.weight[index]
        if self.kind == FORWARD:
            product.multiply(x, weight.t(), gradient=False)
        elif self.kind == WEIGHT:
            # The sum of gradients has the weight's shape.
            product.add_weight_gradient(weight, dy, x)
        else:
            product.multiply(dy, weight, gradient=True)


def choose_library(seconds: Mapping[str, Sequence[float]], default: str) -> str:
    """Return the library for one product from the seconds of its rounds."""
    chosen = default
    for name in LIBRARIES:
        if name != chosen and name in seconds and _is_faster(seconds[name], seconds[chosen]):
            chosen = name
    return chosen


def _is_faster(mine: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a library is faster by `GAIN` than another one, measured in the same rounds."""
    ratios = [theirs / ours for ours, theirs in zip(mine, other, strict=True)]
    return min(other) >= GAIN * min(mine) and statistics.median(ratios) >= GAIN


def rates_of(seconds: Seconds) -> dict[ProductShape, dict[str, float]]:
    """Return GFLOP/s of the fastest round, by shape and library."""
    return {
        shape: {
            name: measured_shape(shape).flops / min(rounds) / 1e9
            for name, rounds in by_library.items()
        }
        for shape, by_library in seconds.items()
    }
