"""What workers under emulated CUDA do: engines on both devices, and what is wrong on purpose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from k2train import fault_injection
from k2train.launch.environment import Launch
from k2train.parallel.device_digest import StateDigest
from k2train.parallel.grid import ProcessGrid, choose_device
from k2train.train.engine import Engine
from k2train.train.setup import Setup
from tests.emulated_cuda.mode import waits
from tests.support.tiny_model import global_batch, split, tiny_config

STEPS = 3


@dataclass(frozen=True)
class Trained:
    """What came of a few steps on one device."""

    kernels: str
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    applied: tuple[bool, ...]
    not_finite: tuple[str, ...]
    """Tensors whose gradient was not finite in some step."""
    held_out: float
    weights: bytes
    """fp32 bytes of this rank's flat shard."""
    digest: str
    """State digest of weights and moments, computed on the device."""
    host_digest: str
    """The same, computed in host memory."""
    waits: Mapping[str, int]
    """Waits of the host in the last step."""


def engine_on(launch: Launch, device_type: str, changes: Mapping[str, Any]) -> Engine:
    """Build a tiny engine on this rank's device, or on the CPU."""
    config = tiny_config(kernels__compile="off", batch__global_sequences=8, **changes)
    device = choose_device(launch) if device_type == "cuda" else torch.device("cpu")
    assert device.type == device_type, "the emulated device is there"
    if device_type == "cuda":
        torch.cuda.set_device(device)
    setup = Setup.of(config, launch.world_size)
    return Engine(setup, ProcessGrid(setup.layout, launch.rank, device))


def batch_of(engine: Engine, step: int) -> list[Any]:
    """This rank's micro-batches of a step, on its device.

    Where wanted, with documents of 5 tokens, of which the first one of a row is often shorter.
    """
    tokens, dp = global_batch(engine.config, step), engine.grid.dp
    mine = tokens.shape[0] // dp.size
    own = slice(dp.rank * mine, (dp.rank + 1) * mine)
    documents = None
    if engine.setup.block:
        rows, positions = (torch.arange(size, dtype=torch.int32) for size in tokens.shape)
        documents = ((positions + rows[:, None] % 5) // 5)[own]
    tokens = tokens[own]
    return [part.to(engine.grid.device) for part in split(engine.config, tokens, documents)]


def engine_job(
    launch: Launch, device_type: str, changes: Mapping[str, Any], faults: str = ""
) -> Trained:
    """Train and evaluate; `faults` are armed in the way of the command line."""
    engine = engine_on(launch, device_type, changes)
    fault_injection.arm(faults, launch.rank)
    results = []
    for step in range(1, STEPS + 1):
        batch = batch_of(engine, step)
        fault_injection.set_step(step)
        with waits() as waited:
            results.append(engine.train_step(batch, engine.config.lr.peak))

    held_out = engine.evaluate(batch_of(engine, 99))
    shards = dict(engine.optimizer.flat_shards)
    return Trained(
        kernels=str(engine.kernels),
        losses=tuple(result.loss for result in results),
        norms=tuple(result.grad_norm for result in results),
        applied=tuple(result.applied for result in results),
        not_finite=tuple(
            name
            for result in results
            for name, norm in result.norms.items()
            if not norm < float("inf")
        ),
        held_out=held_out,
        weights=engine.optimizer.master.cpu().numpy().tobytes(),
        digest=_digest(engine, shards),
        host_digest=_digest(engine, {name: shard.cpu() for name, shard in shards.items()}),
        waits=waited,
    )


def _digest(engine: Engine, shards: Mapping[str, Tensor]) -> str:
    """Digest of this rank's own part."""
    digest = StateDigest(engine.gradients.shard_layout, engine.names, tuple(shards), engine.grid.tp)
    return str(digest.sums(shards).tolist())


def careless_job(launch: Launch) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Waits of a step as it is, and of one in which somebody reads the loss on the way."""
    found = []
    decide = Engine._decide

    def careless(engine: Engine, sums: Tensor, loss: Tensor, flags: Any) -> Any:
        assert loss.item() > 0, "the loss of random weights is above zero"
        return decide(engine, sums, loss, flags)

    engine = engine_on(launch, "cuda", {})
    for way in (decide, careless):
        with mock.patch.object(Engine, "_decide", way), waits() as seen:
            engine.train_step(batch_of(engine, 1), 1e-3)
        found.append(seen)
    return found[0], found[1]


def run_all_job(launch: Launch, module: str) -> dict[str, Any]:
    """Run every function `of_...` of a module in this process: name -> what it returned."""
    import importlib

    checks: Mapping[str, Callable[[], Any]] = vars(importlib.import_module(module))
    return {name[3:]: checks[name]() for name in checks if name.startswith("of_")}
