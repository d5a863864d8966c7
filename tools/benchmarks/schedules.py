"""Worker of `tools/bench_schedules.py`: steps of several pipeline schedules in turns, with spans.

    python -m benchmarks.schedules TASK.json RANK

- All engines are built once and take steps in turns, so other load on the machine hits all of them.
- A span begins when the action's input is there and ends when it returns. Waiting is a gap between
  spans.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from k2train.config.load import load_config
from k2train.data.loader import MicroBatch
from k2train.parallel.grid import ProcessGrid, stop_process_group
from k2train.plan.action import Action
from k2train.train.engine import Engine
from k2train.train.setup import Setup


class Watched:
    """An engine whose executor records the spans of its last step."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.spans: list[list[Any]] = []
        engine.watch_actions = (self._after, self._before)

    def _before(self, action: Action) -> None:
        self.start = time.monotonic()

    def _after(self, action: Action) -> None:
        if action.op.is_compute:
            self.spans.append(
                [action.op.value, action.stage, action.microbatch, self.start, time.monotonic()]
            )

    def step(self, batch: Tensor) -> dict[str, Any]:
        """Run one optimizer step; returns its seconds, also of the processor, loss and spans."""
        config, grid = self.engine.config, self.engine.grid
        mine = batch.chunk(grid.dp.size)[grid.dp.rank]
        self.spans = []
        dist.barrier()
        start, worked = time.monotonic(), time.process_time()
        parts = [MicroBatch(part) for part in mine.split(config.batch.micro_sequences)]
        result = self.engine.train_step(parts, config.lr.peak)
        return {
            "seconds": time.monotonic() - start,
            "cpu_seconds": time.process_time() - worked,
            "loss": result.loss,
            "spans": self.spans,
        }


def run(task: dict[str, Any], rank: int) -> list[list[dict[str, Any]]]:
    """Run the steps of each schedule; the warm-up steps are omitted from the result."""
    torch.set_num_threads(task["threads"])
    store = dist.FileStore(task["store"], task["world"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=task["world"])
    engines = []
    for overrides in task["runs"]:
        config = load_config(task["config"], overrides)
        setup = Setup.of(config, task["world"])
        grid = ProcessGrid(setup.layout, rank, torch.device("cpu"))
        engines.append(Watched(Engine(setup, grid)))

    steps: list[list[dict[str, Any]]] = [[] for _ in engines]
    generator = torch.Generator().manual_seed(1)

    for count in range(task["warmup"] + task["steps"]):
        config = engines[0].engine.config
        shape = (config.batch.global_sequences, config.data.sequence_length)
        batch = torch.randint(config.model.vocab_size, shape, generator=generator)
        for engine, done in zip(engines, steps, strict=True):
            step = engine.step(batch)
            if count >= task["warmup"]:
                done.append(step)

    stop_process_group()
    return steps


def main(arguments: Sequence[str]) -> None:
    """Run the task and write the result beside it."""
    task, rank = Path(arguments[0]), int(arguments[1])
    steps = run(json.loads(task.read_text(encoding="utf-8")), rank)
    task.with_name(f"rank_{rank}.json").write_text(json.dumps(steps), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
