"""k2train engines for one process, from a config made in code, with quickly drawn weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from pydantic import ValidationError

from benchmarks.configs import config_tree
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sizes import Batch
from k2train.config.load import Config
from k2train.data.loader import MicroBatch
from k2train.errors import ConfigError
from k2train.launch.environment import Launch
from k2train.parallel.grid import ProcessGrid, start_process_group, stop_process_group
from k2train.parallel.shard import named_slices
from k2train.plan.cost import ModelShape
from k2train.plan.layout import Layout
from k2train.train.engine import Engine
from k2train.train.setup import Setup
from k2train.train.strict_mode import strict_mode

LR = 1e-4


@contextmanager
def world_of_one(bench: Bench) -> Iterator[ProcessGrid]:
    """Process group and grid of a single process."""
    start_process_group(Launch(rank=0, world_size=1, local_rank=0, launched=False), bench.device)
    try:
        yield ProcessGrid(Layout.for_world(1, 1, 1, 1), 0, bench.device)
    finally:
        stop_process_group()


def config_of(
    shape: ModelShape,
    batch: Batch,
    microbatches: int,
    kernels: dict[str, Any],
    precision: str,
    cross_documents: str = "attend",
) -> Config:
    """Config of that shape; its data is never opened. Raises ConfigError."""
    tree = config_tree(
        asdict(shape),
        batch.length_tokens,
        batch.sequences * microbatches,
        batch.sequences,
        LR,
        data={"cross_documents": cross_documents},
        kernels=kernels,
        precision=precision,
    )
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # A choice that the config refuses, as a user would be told.
        raise ConfigError("; ".join(str(one["msg"]) for one in error.errors())) from None


def make_engine(
    grid: ProcessGrid,
    shape: ModelShape,
    batch: Batch,
    microbatches: int = 1,
    kernels: dict[str, Any] | None = None,
    precision: str = "bf16",
) -> Engine:
    """Engine with random weights drawn on the device.

    The library draws them on the host, by name.
    """
    config = config_of(shape, batch, microbatches, kernels or {}, precision)
    engine = Engine(Setup(config, grid.layout), grid, fill=False)
    generator = torch.Generator(grid.device).manual_seed(7)

    with torch.no_grad():
        for stage in engine.stages.values():
            for parameter, piece in named_slices(stage):
                values = torch.ones(piece.shape, device=grid.device)
                if piece.init_std is not None:
                    values.normal_(0.0, piece.init_std, generator=generator)
                piece.of(parameter).copy_(values)
                engine.optimizer.set_master(piece, values)

    return engine


def token_ids(
    device: torch.device, vocab_size: int, batch: Batch, microbatches: int = 1
) -> list[MicroBatch]:
    """Random ids, [sequences, length_tokens] for each micro-batch."""
    generator = torch.Generator(device).manual_seed(11)
    size = (batch.sequences, batch.length_tokens)
    return [
        MicroBatch(torch.randint(0, vocab_size, size, device=device, generator=generator))
        for _ in range(microbatches)
    ]


def forward_backward(engine: Engine, batch: Sequence[MicroBatch]) -> None:
    """A step without its optimizer: zero gradients, forward and backward, sums.

    In strict mode where the engine computes its steps in it, or other kernels would be timed.
    """
    with strict_mode(engine.strict):
        engine.gradients.zero()
        engine._run(engine.program, batch, None)
        engine.gradients.reduce()
