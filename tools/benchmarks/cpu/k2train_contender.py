"""k2train contender, through its engine; options are the config sections that make the layout.

Memory of the process is kept as in a run, which sets that at its start.

It runs the k2train of this file's own tree, even if another one is installed. So an earlier commit
is measured by its own file with its own package.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import k2train
from benchmarks.configs import config_tree, with_sections
from benchmarks.cpu.contract import Built, UnavailableError
from benchmarks.cpu.llama import batches, global_batch
from benchmarks.cpu.work import Work
from k2train.config.load import Config
from k2train.data.loader import MicroBatch
from k2train.errors import UserError
from k2train.parallel.grid import ProcessGrid
from k2train.plan import cost
from k2train.train.engine import Engine
from k2train.train.host_memory import keep_freed_memory
from k2train.train.setup import Setup

MODEL_KEYS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "vocab_size", "rope_theta",
    "norm_eps", "init_std",
)  # fmt: skip


def build(work: Work, precision: str, options: Mapping[str, Any], rank: int, world: int) -> Built:
    """Build an engine of that layout.

    A config that this version rejects makes the contender unavailable.
    """
    root = Path(__file__).resolve().parents[3]
    assert Path(str(k2train.__file__)).resolve().parents[1] == root, (
        f"k2train came from {k2train.__file__}, not {root}"
    )

    memory = keep_freed_memory("cpu")
    try:
        config = Config.model_validate(_tree(work, precision, options))
        setup = Setup.of(config, world)
        grid = ProcessGrid(setup.layout, rank, torch.device("cpu"))
        engine = Engine(setup, grid)
    except (UserError, ValueError, NotImplementedError) as problem:
        raise UnavailableError(_first_line(problem)) from problem

    rows = batches(global_batch(work), grid.dp.rank, grid.dp.size)
    microbatches = [MicroBatch(part) for part in rows.split(work.micro_sequences)]

    def step() -> float:
        return engine.train_step(microbatches, work.lr).loss

    return Built(step, cost.parameters(setup.architecture), f"{engine.kernels}; {memory}")


def _tree(work: Work, precision: str, options: Mapping[str, Any]) -> dict[str, Any]:
    tree = config_tree(
        {name: getattr(work, name) for name in MODEL_KEYS},
        work.sequence_length,
        work.global_sequences,
        work.micro_sequences,
        work.lr,
        run={"seed": work.seed},
        optimizer={
            "betas": [work.beta1, work.beta2],
            "eps": work.eps,
            "weight_decay": work.weight_decay,
            "clip_norm": None,
        },
        precision=precision,
    )
    return with_sections(tree, options)


def _first_line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    # pydantic heads its report with a count and puts the message below the key.
    message = (
        ": ".join(lines[1:3]) if lines and "validation error" in lines[0] else "".join(lines[:1])
    )
    return message.partition(" [type=")[0]
