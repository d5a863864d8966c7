"""Steps of a small model on any device, and how far two of them are apart.

- The model is small enough for a CPU to follow, and has K2's head size, so that a device takes the
  kernels that it would take for K2.
- Weights are drawn by name from one seed, so every device starts from the same bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.engines import config_of, token_ids
from benchmarks.gpu.sizes import Batch
from k2train.data.loader import MicroBatch
from k2train.parallel.device_digest import StateDigest
from k2train.parallel.grid import ProcessGrid
from k2train.plan.cost import ModelShape
from k2train.plan.layout import Layout
from k2train.state_digest import state_root
from k2train.train.engine import Engine
from k2train.train.setup import Setup

ONE = Layout.for_world(1, 1, 1, 1)
LR = 1e-3
STEPS = 3
CPU = torch.device("cpu")


class DifferentError(Exception):
    """Two results that should be equal are not."""


@dataclass(frozen=True)
class Small:
    """The small model and its micro-batches."""

    shape: ModelShape
    batch: Batch
    microbatches: int = 2
    documents: bool = False
    """Whether rows have several documents, and attention stops at their borders."""


DOCUMENTS_A_ROW = 6
"""Mean number of documents where there are several."""


def small(dry: bool) -> Small:
    """The model of a device, or its tiny twin."""
    if dry:
        return Small(ModelShape(2, 64, 96, 2, 2, 251), Batch(16, 2))
    return Small(ModelShape(4, 1024, 2816, 8, 8, 4003), Batch(1024, 2))


@dataclass(frozen=True)
class Trace:
    """What some steps have computed."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    """Global gradient norm of each step."""
    root: str
    """Hash of all weights and moments after the last step."""
    gradients: Mapping[str, Tensor]
    """Gradient of the first step by global name, fp32 on the CPU."""
    kernels: str


def ids_of(work: Small, device: torch.device) -> list[MicroBatch]:
    """The step's micro-batches, the same ids and documents on every device."""
    made = token_ids(CPU, work.shape.vocab_size, work.batch, work.microbatches)
    if work.documents:
        draw = torch.Generator().manual_seed(13)
        made = [part._replace(documents=_documents(part.tokens, draw)) for part in made]
    return [part.to(device) for part in made]


def _documents(tokens: Tensor, draw: torch.Generator) -> Tensor:
    """Draw the document of each token, int32 [b, s]."""
    begins = torch.rand(tokens.shape, generator=draw) < DOCUMENTS_A_ROW / tokens.shape[1]
    begins[:, 0] = False
    return begins.cumsum(1, dtype=torch.int32)


def build_engine(device: torch.device, work: Small, precision: str, **kernels: Any) -> Engine:
    """Engine with weights drawn by name, on a device. The process group must be up."""
    crossing = "block" if work.documents else "attend"
    config = config_of(work.shape, work.batch, work.microbatches, kernels, precision, crossing)
    return Engine(Setup(config, ONE), ProcessGrid(ONE, 0, device))


def tensors_of(engine: Engine, shard: Tensor) -> dict[str, Tensor]:
    """Whole tensors of a world of one by global name, fp32 on the CPU."""
    layout = engine.gradients.shard_layout
    return {
        slot.param_slice.name: layout.local(shard, slot).detach().float().cpu().clone()
        for slot in layout.slots
    }


def trace(
    device: torch.device, work: Small, precision: str, steps: int = STEPS, **kernels: Any
) -> Trace:
    """Train a new engine for some steps on the same ids."""
    return trace_of(build_engine(device, work, precision, **kernels), work, steps)


def trace_of(engine: Engine, work: Small, steps: int = STEPS) -> Trace:
    """Train an engine for some steps on the same ids."""
    gradients: dict[str, Tensor] = {}
    reduce = engine.gradients.reduce

    def kept() -> Tensor:
        shard = reduce()
        if not gradients:
            gradients.update(tensors_of(engine, shard))
        return shard

    engine.gradients.reduce = kept  # type: ignore[method-assign]
    ids = ids_of(work, engine.grid.device)
    results = [engine.train_step(ids, LR) for _ in range(steps)]
    engine.optimizer.finish()

    return Trace(
        tuple(result.loss for result in results),
        tuple(result.grad_norm for result in results),
        root_of(engine, steps),
        gradients,
        str(engine.kernels),
    )


def root_of(engine: Engine, step: int, on_host: bool = False) -> str:
    """Hash of weights and moments, computed on the engine's device or in host memory."""
    states = engine.optimizer.flat_shards
    if on_host:
        states = {name: values.detach().cpu() for name, values in states.items()}
    digest = StateDigest(engine.gradients.shard_layout, engine.names, list(states), engine.grid.tp)
    # Alone in its world, so this rank's sums are those of all.
    digests = digest.digests(digest.sums(states))
    return state_root(digests, step, engine.optimizer.adam_steps)


@dataclass(frozen=True)
class Distance:
    """How far two traces are apart."""

    loss: float
    """Largest relative difference of a loss or gradient norm."""
    gradient: float
    """Largest difference in a gradient, relative to the largest value of its tensor."""
    tensor: str
    """Where that is."""


def distance(mine: Trace, theirs: Trace) -> Distance:
    """Distance of two traces of the same steps."""
    pairs = [*zip(mine.losses, theirs.losses, strict=True)]
    pairs += [*zip(mine.norms, theirs.norms, strict=True)]
    gradient, tensor = farthest(mine.gradients, theirs.gradients)
    return Distance(max(_relative(a, b) for a, b in pairs), gradient, tensor)


def farthest(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """(largest difference relative to its tensor's largest value, name of that tensor).

    Raises DifferentError when the names differ.
    """
    if mine.keys() != theirs.keys():
        raise DifferentError(f"tensors differ: {sorted(mine.keys() ^ theirs.keys())[:4]}")
    found = {
        name: float((mine[name] - values).abs().max() / values.abs().max().clamp_min(1e-30))
        for name, values in theirs.items()
    }
    # A value that is not a number is farther than all others.
    worst = max(found, key=lambda name: (found[name] != found[name], found[name]))
    return found[worst], worst


def _relative(mine: float, theirs: float) -> float:
    return abs(mine - theirs) / max(abs(theirs), 1e-30)


def hold_within(found: Distance, loss: float, gradient: float) -> dict[str, Any]:
    """Figures of a row. Raises DifferentError when a distance is over its bound."""
    # Written so that a value that is not a number fails.
    if not (found.loss <= loss and found.gradient <= gradient):
        raise DifferentError(
            f"losses {found.loss:.2e} apart (bound {loss:.0e}), gradients {found.gradient:.2e} "
            f"(bound {gradient:.0e}, in {found.tensor})"
        )
    return {"loss_distance": found.loss, "gradient_distance": found.gradient}


def hold_same(roots: Sequence[str], what: str) -> dict[str, Any]:
    """Figures of a row. Raises DifferentError when hashes of states differ."""
    if len({*roots}) > 1:
        raise DifferentError(f"{len({*roots})} different states of {len(roots)} {what}")
    return {"root": roots[0]}
