"""Matrix products of a step by library: rates, the choice of a run, and what it makes of a step.

    python -m benchmarks.products WORK.json OUT.json

- Rates are those of the fastest round, in GFLOP/s, at the shapes that a layout of the config has.
- `starts` measures as often as so many first starts would, each with the budget of a run.
- Steps with and without the choice are taken in turns. The products' part of a step is that of the
  step's own calls.
- The peak is the best rate of any of these products and of a large square one, by any library.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.engines import token_ids
from benchmarks.gpu.sizes import Batch
from benchmarks.timing import in_turns
from k2train.config.load import Config
from k2train.launch.environment import read_launch
from k2train.model.kernels.measure_products import choose_library, measure_products, rates_of
from k2train.model.kernels.product_choice import (
    FORWARD,
    Choice,
    ProductShape,
    available_libraries,
)
from k2train.model.kernels.select import Kernels
from k2train.parallel.collective_matmul import Product
from k2train.parallel.grid import ProcessGrid, start_process_group, stop_process_group
from k2train.train.engine import Engine
from k2train.train.forward_check import device_name
from k2train.train.product_shapes import product_shapes, step_flops
from k2train.train.setup import Setup
from k2train.train.setup_kernels import fp32_library, kernels_of

SQUARE = ProductShape(FORWARD, 1024, 1024, 1024)


class Timed(Product):
    """Products whose seconds are added up."""

    def __init__(self, product: Product):
        self.product, self.seconds = product, 0.0
        self.writes_out = product.writes_out

    def multiply(
        self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
    ) -> Tensor:
        began = time.perf_counter()
        y = self.product.multiply(a, matrix, gradient, out)
        self.seconds += time.perf_counter() - began
        return y

    def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
        began = time.perf_counter()
        self.product.add_weight_gradient(into, dy, x)
        self.seconds += time.perf_counter() - began

    def gradient_sums(self, device: torch.device, dtype: torch.dtype) -> str:
        return self.product.gradient_sums(device, dtype)


def measured(work: dict[str, Any]) -> dict[str, Any]:
    """Figures of one work: config, threads, steps, starts."""
    torch.set_num_threads(work["threads"])
    start_process_group(read_launch(), torch.device("cpu"))
    try:
        return _figures(work)
    finally:
        stop_process_group()


def _figures(work: dict[str, Any]) -> dict[str, Any]:
    setup = Setup.of(Config.model_validate(work["config"]), 1)
    grid = ProcessGrid(setup.layout, 0, torch.device("cpu"))
    kernels = kernels_of(setup, grid.device)
    default, libraries = fp32_library(kernels), available_libraries()

    shapes = product_shapes(setup)
    tables = []
    for _ in range(max(1, work["starts"])):
        seconds = measure_products(shapes, libraries)
        tables.append({shape: choose_library(seconds[shape], default) for shape in shapes})
    rates = rates_of(seconds)
    square = rates_of(measure_products([SQUARE], libraries, 0.3))[SQUARE]
    choice = Choice(device_name(grid), work["threads"], default, tables[-1])
    return {
        "processor": choice.processor,
        "default": default,
        "choice": str(choice),
        "peak": max(rate for rows in (*rates.values(), square) for rate in rows.values()),
        "rows": [[str(shape), rates[shape], tables[-1][shape]] for shape in shapes],
        "starts": _counts(tables),
        **_steps(setup, grid, choice, kernels, work["steps"]),
    }


def _counts(tables: Sequence[dict[ProductShape, str]]) -> dict[str, Any]:
    """How often the whole table was the most frequent one, and which products moved."""
    whole = Counter(json.dumps([[str(a), b] for a, b in table.items()]) for table in tables)
    moved = [str(shape) for shape in tables[0] if len({table[shape] for table in tables}) > 1]
    return {"all": len(tables), "same": max(whole.values()), "moved": moved}


def _steps(
    setup: Setup, grid: ProcessGrid, choice: Choice, kernels: Kernels, count: int
) -> dict[str, Any]:
    """Seconds of a step and of its products, by default and with the choice."""
    config = setup.config
    size = Batch(config.data.sequence_length, config.batch.micro_sequences)
    batch = token_ids(grid.device, config.model.vocab_size, size, setup.num_microbatches)
    works, timed = [], []
    for chosen in (kernels, kernels_of(setup, grid.device, choice)):
        product = Timed(chosen.product or Product())
        engine = Engine(setup, grid, kernels=replace(chosen, product=product))
        works.append(lambda engine=engine: engine.train_step(batch, config.lr.peak))
        timed.append(product)
    # One step of each before the clock starts.
    for work in works:
        work()
    for product in timed:
        product.seconds = 0.0
    before, after = in_turns(count, *works, warmup=0)
    return {
        "step_seconds": [before, after],
        "product_seconds": [product.seconds / count for product in timed],
        "flops": step_flops(setup),
    }


def main(arguments: Sequence[str]) -> None:
    """Measure the work file's products and write the figures."""
    source, target = map(Path, arguments)
    target.write_text(json.dumps(measured(json.loads(source.read_text()))))


if __name__ == "__main__":
    main(sys.argv[1:])
