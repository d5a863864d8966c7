"""GPU benchmark part `host`: a profiled step, to see if the host keeps the device busy."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import LR, make_engine, token_ids, world_of_one
from benchmarks.gpu.profiling import profile_engine
from benchmarks.gpu.sizes import Batch, sizes
from k2train.parallel.grid import ProcessGrid
from k2train.plan.cost import ModelShape

MICROBATCHES = 4
"""Several micro-batches, to separate the cost per micro-batch from the cost per step."""


def run(bench: Bench) -> None:
    """Profile a step, and write its rows."""
    work = sizes(bench.dry)
    name, small = work.models[0]
    layers = replace(work.k2, num_layers=work.k2_layers[-1])
    cases = [
        (f"K2's layers, {layers.num_layers}", layers, work.k2_batches[0]),
        (name, small, work.model_batches[0]),
    ]

    with world_of_one(bench) as grid:
        for what, shape, batch in cases:
            for microbatches in (1, MICROBATCHES):
                label = (
                    f"{what}, {batch}, {microbatches} micro-batch{'es' if microbatches > 1 else ''}"
                )
                bench.attempt(label, partial(profiled, bench, grid, shape, batch, microbatches))


def profiled(
    bench: Bench, grid: ProcessGrid, shape: ModelShape, batch: Batch, microbatches: int
) -> Mapping[str, Any]:
    """Profile of one engine's step."""
    engine = make_engine(grid, shape, batch, microbatches)
    ids = token_ids(bench.device, shape.vocab_size, batch, microbatches)
    found = profile_engine(engine, ids, LR, bench.cuda)
    if found.busy_seconds == 0:
        # Common in containers: the driver lets only administrators count.
        raise RuntimeError("the profiler saw no kernel; CUPTI may lack the right to count")
    busy = None if found.busy_seconds is None else found.busy_seconds / found.profiled_seconds
    return {**asdict(found), "rest_seconds": found.rest_seconds, "busy_share": busy}
