"""Worker of `tools/bench_profile.py`: builds this rank's engine and profiles a step.

    python -m benchmarks.gpu.profile_work WORK.json OUT.json       (alone or under torchrun)

Rank 0 writes the result as JSON.
"""

import json
import sys
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
from k2train.train.engine import Engine
from k2train.train.setup import Setup


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
