"""Contenders on whole models: k2train, a fair peer, and transformers and a hand-written LLaMA.

- All train the same shape on the same ids with a fused AdamW at the same rate. Compiled ones are
  compiled by block, as every layer is alike, and so is the hand-written LLaMA's loss.
- The fair peer keeps the same precision as k2train: fp32 weights, gradients and moments, bf16
  products by autocast (16 bytes a parameter, and a copy in bf16 while a step lasts). It is the
  hand-written LLaMA on plain torch, compiled.
- The other peers update bf16 weights with bf16 moments (8 bytes), as such scripts do. That is less
  memory and fewer bytes to move, to their advantage.
- k2train clips the gradient norm; the peers do not.

Alternatives considered:
- Compiling whole models: minutes for each of them, to the same kernels in every layer.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks.cpu.contract import UnavailableError
from benchmarks.cpu.llama import FusedAdamW, Llama, LossOf, labels_of, mean_loss, size_of
from benchmarks.cpu.work import Work
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import LR, make_engine, token_ids
from benchmarks.gpu.rows import FAIR
from benchmarks.gpu.sizes import Batch
from k2train.parallel.grid import ProcessGrid
from k2train.plan.cost import ModelShape, parameters

PEER_BYTES = 8
"""A parameter of a peer: weight, gradient and two moments in bf16."""
FAIR_BYTES = 18
"""Of the fair peer: fp32 weight, gradient and two moments, and the copy in bf16."""
OUR_BYTES = 18
"""A parameter of ours: bf16 weight, fp32 gradient, master weight and two moments."""


@dataclass
class Contender:
    """One model in memory.

    `step()` trains on the same ids each time and returns the mean loss, a tensor or a number.
    """

    name: str
    step: Callable[[], Tensor | float]
    compiled: bool = False
    """Whether the first step waits for a compiler."""


@dataclass(frozen=True)
class PeerModel:
    """A peer's model and its loss of ids [sequences, length]."""

    model: nn.Module
    loss: LossOf
    parts: Sequence[tuple[Any, str]]
    """(object, name of its method) of what is compiled by itself."""
    autocast: bool = False


def optional(name: str) -> Any:
    """Import a module that may be missing. Raises UnavailableError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{error.name or name} cannot be imported: {error}") from None


def k2train_contender(
    bench: Bench,
    grid: ProcessGrid,
    shape: ModelShape,
    batch: Batch,
    microbatches: int = 1,
    kernels: dict[str, Any] | None = None,
) -> Contender:
    """k2train's engine as a contender."""
    engine = make_engine(grid, shape, batch, microbatches, kernels)
    ids = token_ids(bench.device, shape.vocab_size, batch, microbatches)
    changes = ", ".join(f"{key} {value}" for key, value in (kernels or {}).items())
    name = f"k2train, {changes}" if changes else "k2train"
    return Contender(name, lambda: engine.train_step(ids, LR).loss)


def transformers_model(work: Work) -> PeerModel:
    """LlamaForCausalLM with SDPA, in bf16."""
    model, loss = optional("benchmarks.cpu.hugging_face").make_model(work, torch.bfloat16)
    return PeerModel(model, loss, [(layer, "forward") for layer in model.model.layers])


class _LlamaLoss:
    """Mean loss of the hand-written LLaMA."""

    def __init__(self, model: Llama):
        self._model = model

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(logits, labels)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.of_logits(self._model(ids), labels_of(ids))


def _llama(work: Work, dtype: torch.dtype, autocast: bool = False) -> PeerModel:
    """The hand-written LLaMA; `autocast`: its products and activations in bf16."""
    model = Llama(work, dtype=dtype, activations=torch.bfloat16)
    loss = _LlamaLoss(model)
    parts: list[tuple[Any, str]] = [(block, "forward") for block in model.blocks.values()]
    return PeerModel(model, loss, [*parts, (loss, "of_logits")], autocast)


def reference_model(work: Work) -> PeerModel:
    """The hand-written LLaMA, in bf16."""
    return _llama(work, torch.bfloat16)


def fair_model(work: Work) -> PeerModel:
    """The hand-written LLaMA with fp32 weights, for autocast."""
    return _llama(work, torch.float32, autocast=True)


MODELS = {"transformers": transformers_model, "reference": reference_model, FAIR: fair_model}


def peer_contenders(
    bench: Bench, name: str, shape: ModelShape, batch: Batch, microbatches: int = 1
) -> list[Contender]:
    """A peer and the same peer compiled, sharing weights and optimizer so that both fit at once.

    The fair peer is compiled only.
    """
    made = build_model(bench, name, shape, batch)
    optimizer = FusedAdamW(work_of(shape, batch), made.model.parameters())
    parts = token_ids(bench.device, shape.vocab_size, batch, microbatches)

    def scope() -> AbstractContextManager[Any]:
        return torch.autocast(bench.device.type, torch.bfloat16) if made.autocast else nullcontext()

    def step() -> Tensor:
        total = torch.zeros((), device=bench.device)
        for part in parts:
            with scope():
                found = made.loss(part.tokens) / len(parts)
            found.backward()
            total += found.detach()
        optimizer.step()
        return total

    compiled = CompiledParts(made.parts, bench.dry)

    def compiled_step() -> Tensor:
        with compiled.used():
            return step()

    if made.autocast:
        return [Contender(name, compiled_step, True)]
    return [Contender(name, step), Contender(f"{name} compiled", compiled_step, True)]


def work_of(shape: ModelShape, batch: Batch) -> Work:
    """The shape as the peers take it."""
    sizes = {key: value for key, value in asdict(shape).items() if key != "num_kv_heads"}
    return Work(
        **sizes,
        sequence_length=batch.length_tokens,
        micro_sequences=batch.sequences,
        global_sequences=batch.sequences,
        lr=LR,
    )


def build_model(bench: Bench, name: str, shape: ModelShape, batch: Batch) -> PeerModel:
    """A peer's model on the device, of exactly the shape's number of parameters."""
    with torch.device(bench.device):
        made = MODELS[name](work_of(shape, batch))
    found = size_of(made.model.parameters())
    assert found == parameters(shape), (
        f"{name} has {found} parameters, the shape {parameters(shape)}"
    )
    return made


class CompiledParts:
    """Compiled functions of a model that can be switched on and off.

    A layer that would fall back to plain torch, because it was compiled too often, is an error: it
    would be timed under a wrong name.
    """

    def __init__(self, parts: Sequence[tuple[Any, str]], dry: bool):
        # A dry run traces and splits the same, but waits for no compiler.
        backend = "aot_eager" if dry else "inductor"
        self._compiled = [
            (owner, name, torch.compile(getattr(owner, name), dynamic=False, backend=backend))
            for owner, name in parts
        ]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Compute with the compiled functions, within the context."""
        for owner, name, function in self._compiled:
            setattr(owner, name, function)

        limits = {
            "recompile_limit": 2 * len(self._compiled) + 8,
            "accumulated_recompile_limit": 8 * len(self._compiled) + 256,
            "fail_on_recompile_limit_hit": True,
        }
        try:
            with torch._dynamo.config.patch(limits):
                yield
        finally:
            for owner, name, _ in self._compiled:
                delattr(owner, name)
