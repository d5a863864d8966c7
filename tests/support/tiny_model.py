"""Small configs and training jobs shared by several test files."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k2train.checkpoint.manifest import DataFacts, DataPosition, SaveFacts
from k2train.config.load import Config
from k2train.data.loader import MicroBatch
from k2train.launch.environment import Launch
from k2train.parallel.grid import ProcessGrid
from k2train.train.engine import Engine
from k2train.train.setup import Setup

TINY: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 7},
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_heads": 4,
        "num_kv_heads": 4,
        "vocab_size": 251,
        # Ten times K2's, so that every gradient is far above fp32 rounding at this size.
        "init_std": 0.2,
    },
    "data": {"manifest": "unused/manifest.json", "sequence_length": 16},
    "batch": {"global_sequences": 24, "micro_sequences": 2},
    "parallel": {"tensor": 1, "pipeline": 1},
    "lr": {"kind": "constant", "peak": 1e-3},
    # Far above K2's 1e-8: with that, an entry whose gradient is mere rounding takes a full step of
    # either sign.
    "optimizer": {"eps": 1e-4},
    "precision": "fp32",
}


def tiny_config(**changes: Any) -> Config:
    """TINY with dotted keys changed, the dot written as two underscores: `parallel__tensor=2`."""
    tree = {
        section: dict(value) if isinstance(value, dict) else value
        for section, value in TINY.items()
    }

    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value

    return Config.model_validate(tree)


def grid_of(launch: Launch, config: Config) -> ProcessGrid:
    layout = Setup.of(config, launch.world_size).layout
    return ProcessGrid(layout, launch.rank, torch.device("cpu"))


def engine_of(config: Config, grid: ProcessGrid, fill: bool = True) -> Engine:
    return Engine(Setup.of(config, grid.layout.world_size), grid, fill)


def save_facts(step: int, adam_steps: int, **facts: Any) -> SaveFacts:
    """What a run says of a checkpoint, as little as a reader needs."""
    return SaveFacts(
        step=step,
        adam_steps=adam_steps,
        consumed_tokens=0,
        chunks=DataPosition(consumed=0),
        config={},
        data=DataFacts(),
        **facts,
    )


def global_batch(config: Config, step: int) -> Tensor:
    """Token ids [global_sequences, sequence_length] of a step, the same on every rank."""
    rng = np.random.Generator(np.random.Philox(key=1000 + step))
    shape = (config.batch.global_sequences, config.data.sequence_length)
    return torch.from_numpy(rng.integers(0, config.model.vocab_size, shape))


def microbatches_of(config: Config, grid: ProcessGrid, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of a step: a contiguous slice of the global batch, cut in order."""
    batch = global_batch(config, step)
    mine = batch.shape[0] // grid.dp.size
    return split(config, batch[grid.dp.rank * mine : (grid.dp.rank + 1) * mine])


def split(config: Config, tokens: Tensor, documents: Tensor | None = None) -> list[MicroBatch]:
    """Rows [n, s] of this rank as micro-batches."""
    size = config.batch.micro_sequences
    return [
        MicroBatch(tokens[n : n + size], None if documents is None else documents[n : n + size])
        for n in range(0, len(tokens), size)
    ]


def local_gradients(
    engine: Engine, shard: Tensor
) -> dict[str, tuple[list[tuple[int, int]], np.ndarray]]:
    """Of each global tensor the block this rank optimizes: ([(start, stop) by dimension],
    values).
    """
    found = {}
    for slot in engine.gradients.shard_layout.slots:
        param_slice, (low, high) = slot.param_slice, slot.rows(engine.grid.dp)
        box = [(0, n) for n in param_slice.global_shape]
        if param_slice.dim is not None:
            box[param_slice.dim] = (param_slice.start, param_slice.stop)
        box[0] = (box[0][0] + low, box[0][0] + high)
        found[param_slice.name] = (
            box,
            engine.gradients.shard_layout.local(shard, slot).clone().numpy(),
        )

    return found


def assemble(
    parts: list[dict[str, tuple[list[tuple[int, int]], np.ndarray]]],
    names: dict[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """Whole tensors from the blocks of all ranks; blocks held twice must be bit-equal, and nothing
    may be left out.
    """
    whole = {}
    for name, shape in names.items():
        out, seen = np.full(shape, np.nan, dtype=np.float32), np.zeros(shape, dtype=bool)
        for part in parts:
            if name not in part:
                continue
            box, values = part[name]
            index = tuple(slice(a, b) for a, b in box)
            assert not seen[index].any() or np.array_equal(
                out[index][seen[index]], values[seen[index]]
            ), f"{name}: replicas differ"
            out[index], seen[index] = values, True

        assert seen.all(), f"{name}: {int((~seen).sum())} values held by no rank"
        whole[name] = out

    return whole


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor, written down independently of the layers."""
    m = config.model
    h, f, kv = (
        m.hidden_size,
        m.ffn_hidden_size,
        m.hidden_size // m.num_heads * (m.num_kv_heads or m.num_heads),
    )
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (m.vocab_size, h)}

    for n in range(m.num_layers):
        shapes |= {
            f"layers.{n}.attention_norm.weight": (h,),
            f"layers.{n}.attention.query.weight": (h, h),
            f"layers.{n}.attention.key.weight": (kv, h),
            f"layers.{n}.attention.value.weight": (kv, h),
            f"layers.{n}.attention.output.weight": (h, h),
            f"layers.{n}.mlp_norm.weight": (h,),
            f"layers.{n}.mlp.gate.weight": (f, h),
            f"layers.{n}.mlp.up.weight": (f, h),
            f"layers.{n}.mlp.down.weight": (h, f),
        }

    return shapes | {"norm.weight": (h,), "head.weight": (m.vocab_size, h)}


Batches = Callable[[Config, ProcessGrid, int], list[MicroBatch]]
"""This rank's micro-batches of a step."""


def train_job(
    launch: Launch, config: Config, steps: int, batches: Batches = microbatches_of
) -> dict[str, Any]:
    """Some steps on the grid of `config`: losses, norms, and this rank's blocks of weights and
    reduced gradients.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    start = local_gradients(engine, engine.optimizer.master)
    results, gradients = [], []
    reduce = engine.gradients.reduce

    def reduced() -> Tensor:
        shard = reduce()
        gradients.append(local_gradients(engine, shard))
        return shard

    engine.gradients.reduce = reduced  # type: ignore[method-assign]
    for step in range(1, steps + 1):
        result = engine.train_step(batches(config, grid, step), config.lr.peak)
        results.append((result.loss, result.grad_norm, result.applied))

    return {
        "start": start,
        "results": results,
        "gradients": gradients,
        "weights": local_gradients(engine, engine.optimizer.master),
        "held_out": engine.evaluate(batches(config, grid, 99)),
    }
