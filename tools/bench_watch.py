"""Monitoring overhead benchmark: the cost of watchdog, audits and reports per training step.

    python tools/bench_watch.py [--steps N] [--hidden H]

- Two runs of one config in one process take steps in turns. One has heartbeats, watchdog, request
  files, straggler statistics and every audit; the other has none of them.
- Steps with an audit are timed separately and spread over the steps between two audits
  (`audit.*_every_steps`, 100 by default), since a short benchmark has none.
- Medians are shown. All runs must end with the same state, or they did different work.

Alternatives considered:
- Two whole runs one after the other: a shared machine is slower in one half of the minute than in
  the other.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from k2train.config.load import Config
from k2train.data.chunk import write_chunk, write_manifest
from k2train.guard.stop_signals import StopRequest
from k2train.launch.environment import Launch
from k2train.parallel.grid import ProcessGrid, start_process_group, stop_process_group
from k2train.train.preflight import prepare_start
from k2train.train.trainer import Trainer

VOCAB, SEQUENCE, BATCH = 8192, 256, 8
OFF = {
    "watch": {"heartbeat_seconds": 0},
    "audit": {"replicas_every_steps": 0, "root_every_steps": 0},
}
EVERY = 100
"""Steps between two audits, the default of configs."""


def config_of(folder: Path, name: str, hidden: int, sections: dict[str, Any]) -> Config:
    """Config of a LLaMA of 8 layers on the benchmark's data."""
    return Config.model_validate(
        {
            "run": {"name": name, "directory": str(folder / "runs"), "seed": 1},
            "model": {
                "num_layers": 8,
                "hidden_size": hidden,
                "ffn_hidden_size": hidden * 11 // 4 // 16 * 16,
                "num_heads": 8,
                "num_kv_heads": 8,
                "vocab_size": VOCAB,
            },
            "data": {
                "manifest": str(folder / "data" / "manifest.json"),
                "sequence_length": SEQUENCE,
            },
            "batch": {"global_sequences": BATCH, "micro_sequences": 4},
            "lr": {"kind": "constant", "peak": 1e-4},
            "precision": "fp32",
            **sections,
        }
    )


def trainer_of(config: Config) -> Trainer:
    """Start a run in this process."""
    start = prepare_start(config, 1, verify=True)
    trainer = Trainer(
        config, ProcessGrid(start.layout, 0, torch.device("cpu")), start, StopRequest(), verify=True
    )
    trainer.begin()
    trainer.checkpoints.writer.wait()
    return trainer


def step_of(trainer: Trainer) -> float:
    """Time one step of the training loop, with its records."""
    began = time.perf_counter()
    trainer.step += 1
    trainer._one_step()
    return time.perf_counter() - began


def measure(folder: Path, steps: int, hidden: int) -> dict[str, float]:
    """Median seconds of `on`, `off` and `audited` (a step with both audits).

    Checks that all runs end with the same state.
    """
    rows = (3 * steps + 2) * BATCH
    (folder / "data").mkdir()
    ids = (
        np.random.Generator(np.random.Philox(key=1))
        .integers(0, VOCAB, (rows, SEQUENCE))
        .astype(np.uint16)
    )

    info = write_chunk(folder / "data", "chunk_000", [ids], rows, VOCAB, {"noise": rows * SEQUENCE})
    write_manifest(
        folder / "data",
        tokenizer_sha256="0" * 64,
        sequence_length=SEQUENCE,
        vocab_size=VOCAB,
        chunks=[info],
        held_out=None,
    )

    each = {"audit": {"replicas_every_steps": 1, "root_every_steps": 1}}
    kinds: dict[str, dict[str, Any]] = {"on": {}, "off": OFF, "audited": each}
    runs = {
        name: trainer_of(config_of(folder, name, hidden, sections))
        for name, sections in kinds.items()
    }

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(steps + 2):
        # In turns, each run equally often first: the first finds another state of the caches.
        names = list(runs)[number % 3 :] + list(runs)[: number % 3]
        for name in names:
            seconds[name].append(step_of(runs[name]))

    masters = [run.engine.optimizer.master for run in runs.values()]
    assert all(torch.equal(masters[0], other) for other in masters), (
        "monitoring changed the training result"
    )

    for run in runs.values():
        run.close()
        run.monitor.close()

    return {name: statistics.median(taken[2:]) for name, taken in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="bench_watch.py", description="Cost of monitoring a training step, as a ratio."
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=256)
    options = parser.parse_args(arguments)

    start_process_group(Launch(0, 1, 0, launched=False), torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="k2train-bench-") as folder:
        found = measure(Path(folder), options.steps, options.hidden)
    stop_process_group()

    off = found["off"]
    audit = (found["audited"] - found["on"]) / EVERY
    print(
        f"| step, 1 process, {options.steps} of each in turns | seconds | against no monitoring |"
    )
    print("|---|---|---|")
    print(f"| no monitoring | {off:.4f} | 1 |")
    print(f"| monitoring | {found['on']:.4f} | {found['on'] / off:.4f} |")
    print(
        f"| monitoring, audits every {EVERY} steps | {found['on'] + audit:.4f} | "
        f"{(found['on'] + audit) / off:.4f} |"
    )
    print(
        f"| monitoring, both audits in the step | {found['audited']:.4f} | "
        f"{found['audited'] / off:.4f} |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
