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

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command_line import Parser, command

from benchmarks.configs import config_tree
from benchmarks.random_data import random_folder
from benchmarks.timing import in_turns
from k2train.config.load import Config
from k2train.guard.stop_signals import StopRequest
from k2train.launch.environment import Launch
from k2train.parallel.grid import ProcessGrid, start_process_group, stop_process_group
from k2train.text import markdown_table
from k2train.train.monitor import RunMonitor
from k2train.train.preflight import prepare_start
from k2train.train.run import build
from k2train.train.shutdown import OpenRun
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
    model = {
        "num_layers": 8,
        "hidden_size": hidden,
        "ffn_hidden_size": hidden * 11 // 4 // 16 * 16,
        "num_heads": 8,
        "num_kv_heads": 8,
        "vocab_size": VOCAB,
    }
    own = {
        "run": {"name": name, "directory": str(folder / "runs"), "seed": 1},
        "data": {"manifest": str(folder / "data" / "manifest.json")},
    }
    tree = config_tree(model, SEQUENCE, BATCH, 4, 1e-4, precision="fp32", **own, **sections)
    return Config.model_validate(tree)


def trainer_of(config: Config) -> Trainer:
    """Start a run in this process."""
    start = prepare_start(config, 1, verify=True)
    grid = ProcessGrid(start.layout, 0, torch.device("cpu"))
    trainer = build(
        start, OpenRun(grid, RunMonitor(start.setup, grid, start.directory, StopRequest()))
    )
    assert trainer is not None, "a new run has steps to train"
    trainer.checkpoints.writer.wait()
    return trainer


def step_of(trainer: Trainer) -> None:
    """One step of the training loop, with its records."""
    trainer.state.step += 1
    trainer.train_step()


def measure(folder: Path, steps: int, hidden: int) -> dict[str, float]:
    """Median seconds of `on`, `off` and `audited` (a step with both audits).

    Checks that all runs end with the same state.
    """
    random_folder(folder / "data", 1, (3 * steps + 2) * BATCH, SEQUENCE, VOCAB)
    each = {"audit": {"replicas_every_steps": 1, "root_every_steps": 1}}
    kinds: dict[str, dict[str, Any]] = {"on": {}, "off": OFF, "audited": each}
    runs = {
        name: trainer_of(config_of(folder, name, hidden, sections))
        for name, sections in kinds.items()
    }

    steps_of = [partial(step_of, run) for run in runs.values()]
    medians = in_turns(steps, *steps_of, warmup=2)

    masters = [run.engine.optimizer.master for run in runs.values()]
    assert all(torch.equal(masters[0], other) for other in masters), (
        "monitoring changed the training result"
    )

    for run in runs.values():
        run.opened.close()
        run.monitor.close()

    return dict(zip(runs, medians, strict=True))


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(
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
    seconds = {
        "no monitoring": off,
        "monitoring": found["on"],
        f"monitoring, audits every {EVERY} steps": found["on"] + audit,
        "monitoring, both audits in the step": found["audited"],
    }
    what = f"step, 1 process, {options.steps} of each in turns"
    rows = (
        (name, f"{spent:.4f}", "1" if spent is off else f"{spent / off:.4f}")
        for name, spent in seconds.items()
    )
    print("\n".join(markdown_table((what, "seconds", "against no monitoring"), rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
