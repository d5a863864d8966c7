"""GPU check part `price`: K2's layers with and without determinism, forward and backward in turns.

- Both engines alternate, so that clocks and heat hit both alike.
- The optimizer is left out: it is the same in both, and would hide the difference at one
  micro-batch.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.cpu.contract import UnavailableError
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import forward_backward, make_engine, token_ids, world_of_one
from benchmarks.gpu.memory import states_bytes
from benchmarks.gpu.sizes import Batch, sizes
from benchmarks.gpu.timing import Timer
from k2train.parallel.grid import ProcessGrid
from k2train.plan.cost import ModelShape
from k2train.text import bytes_text

SPARE = 0.8
"""Share of the device's memory that the states of both engines may fill: the rest is their work."""
LAYERS = (2, 1)
"""How many of K2's layers, most first: the first of which two engines fit is taken."""


def run(bench: Bench) -> None:
    """Time forward and backward at every length."""
    with world_of_one(bench) as grid:
        for batch in sizes(bench.dry).k2_batches:
            bench.attempt(f"K2's layers, {batch}", partial(price, bench, grid, batch))


def fitting_shape(bench: Bench) -> ModelShape:
    """As many of K2's layers as fit twice. Raises UnavailableError."""
    total, k2 = bench.total_bytes(), sizes(bench.dry).k2
    shapes = [replace(k2, num_layers=layers) for layers in LAYERS]
    for shape in shapes:
        if total is None or 2 * states_bytes(shape, "bf16") < SPARE * total:
            return shape
    needed = 2 * states_bytes(shapes[-1], "bf16")
    raise UnavailableError(f"two engines need {bytes_text(needed)} of {bytes_text(total or 0)}")


def price(bench: Bench, grid: ProcessGrid, batch: Batch) -> Mapping[str, Any]:
    """Share of the time that determinism adds; negative where it saves."""
    shape = fitting_shape(bench)
    engines = [
        make_engine(grid, shape, batch, 1, {"deterministic": choice}) for choice in (True, False)
    ]
    ids = token_ids(bench.device, shape.vocab_size, batch)
    works = [partial(forward_backward, engine, ids) for engine in engines]
    ordered, free = Timer(bench).in_turns(works, sizes(bench.dry).rounds)
    return {
        "price": ordered.median / free.median - 1,
        "deterministic_seconds": ordered.median,
        "free_seconds": free.median,
        "spread": max(ordered.spread, free.spread),
        "kernels": f"{engines[0].kernels} | {engines[1].kernels}",
    }
