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

from benchmarks.gpu.profiling import engine_parts, profile_step, scopes
from k2train.config.load import Config
from k2train.launch.environment import read_launch
from k2train.parallel.grid import ProcessGrid, start_process_group, stop_process_group
from k2train.train.engine import Engine
from k2train.train.preflight import layout_of

WARM_UP_STEPS = 3


def profiled(work: dict[str, Any]) -> dict[str, Any]:
    """Profile of this rank. `work`: config, threads, steps, cuda."""
    config = Config.model_validate(work["config"])
    torch.set_num_threads(work["threads"])
    launch = read_launch()
    device = torch.device("cuda", launch.local_rank) if work["cuda"] else torch.device("cpu")
    start_process_group(launch, device)

    try:
        batch, layout = config.batch, layout_of(config, launch.world_size)
        engine = Engine(config, ProcessGrid(layout, launch.rank, device))
        generator = torch.Generator(device).manual_seed(5)
        size = (engine.num_microbatches, batch.micro_sequences, config.data.sequence_length)
        ids = list(
            torch.randint(0, config.model.vocab_size, size, device=device, generator=generator)
        )
        with scopes(engine_parts(engine)):
            for _ in range(WARM_UP_STEPS):
                engine.train_step(ids, config.lr.peak)
            found = profile_step(
                lambda: engine.train_step(ids, config.lr.peak), work["cuda"], work["steps"]
            )
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
