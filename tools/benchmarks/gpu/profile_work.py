"""Worker of `tools/bench_profile.py`: builds this rank's engine and profiles a step.

    python -m benchmarks.gpu.profile_work WORK.json OUT.json       (alone or under torchrun)

Rank 0 writes the result as JSON.

- On a CPU it also measures the peak of products: the fastest square one of a sweep, with the
  threads and the precision of the step, by all ranks at a time. So the share of it is of what these
  libraries reach on this processor.

Alternatives considered:
- The peak of a data sheet: a virtual processor does not say its clock with all units in use.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engines import token_ids
from benchmarks.gpu.profiling import profile_engine
from benchmarks.gpu.sizes import Batch
from k2train.config.load import Config
from k2train.launch.environment import read_launch
from k2train.parallel.grid import ProcessGrid, start_process_group, stop_process_group
from k2train.plan import cost
from k2train.train.engine import Engine
from k2train.train.setup import Setup

PEAK_SIZES = (256, 512, 1024)
PEAK_ROUNDS = 3
LONG_SECONDS = 0.5
"""A product that takes longer ends the sweep: emulated bf16 would take minutes."""


def measured_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest product [n, n] @ [n, n], n of `PEAK_SIZES`; medians of rounds."""
    rates = []
    for size in PEAK_SIZES:
        a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        seconds = []
        # The first one also makes the library choose its code.
        for _ in range(1 + PEAK_ROUNDS):
            began = time.perf_counter()
            torch.mm(a, b)
            seconds.append(time.perf_counter() - began)
        rates.append(2 * size**3 / statistics.median(seconds[1:]))
        if seconds[-1] > LONG_SECONDS:
            break
    return max(rates)


def layer_flops(setup: Setup, config: Config) -> int | None:
    """FLOPs of this rank's products with the layers' matrices in a step: 6 a parameter and token.

    The head's are part of the loss. None with full recomputation, which repeats some of them.
    """
    if config.kernels.recompute == "full":
        return None
    tokens = config.batch.global_sequences * config.data.sequence_length
    matrices = config.model.num_layers * cost.layer_matrix_parameters(setup.architecture)
    return 6 * tokens * matrices // setup.layout.world_size


def profiled(work: dict[str, Any]) -> dict[str, Any]:
    """Profile of this rank. `work`: config, threads, steps, cuda."""
    config = Config.model_validate(work["config"])
    torch.set_num_threads(work["threads"])
    launch = read_launch()
    device = torch.device("cuda", launch.local_rank) if work["cuda"] else torch.device("cpu")
    start_process_group(launch, device)

    try:
        batch, setup = config.batch, Setup.of(config, launch.world_size)
        engine = Engine(setup, ProcessGrid(setup.layout, launch.rank, device))
        size = Batch(config.data.sequence_length, batch.micro_sequences)
        ids = token_ids(device, config.model.vocab_size, size, setup.num_microbatches)
        found = profile_engine(engine, ids, config.lr.peak, work["cuda"], work["steps"])
        facts = {
            "rank": launch.rank,
            "kernels_chosen": str(engine.kernels),
            "torch": torch.__version__,
            "layer_flops": layer_flops(setup, config),
            "peak_flops": None if work["cuda"] else measured_peak(engine.dtype),
        }
        return {**asdict(found), **facts, "rest_seconds": found.rest_seconds}
    finally:
        stop_process_group()


def main(arguments: list[str]) -> int:
    """Profile the work file's step and write the result."""
    source, target = (Path(argument) for argument in arguments)
    found = profiled(json.loads(source.read_text()))
    if found["rank"] == 0:
        target.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
