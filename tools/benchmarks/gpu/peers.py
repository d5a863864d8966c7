"""Contenders on whole models: k2train, transformers and the hand-written reference, also compiled.

- All train the same shape on the same ids with a fused AdamW at the same rate.
- k2train keeps fp32 master weights, moments and gradients (18 bytes per parameter).
- The peers update bf16 weights with bf16 moments (8 bytes), as such scripts do. That is less memory
  and fewer bytes to move, to their advantage.
- k2train clips the gradient norm; the peers do not.
"""

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu.contract import UnavailableError
from benchmarks.cpu.llama import FusedAdamW, Llama, LossOf, loss_of, size_of
from benchmarks.cpu.work import Work
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import LR, make_engine, token_ids
from benchmarks.gpu.sizes import Batch
from k2train.parallel.grid import ProcessGrid
from k2train.plan.cost import ModelShape, parameters

PEER_BYTES = 8
"""A parameter of a peer: weight, gradient and two moments in bf16."""
OUR_BYTES = 18
"""A parameter of ours: bf16 weight, fp32 gradient, master weight and two moments."""


@dataclass
class Contender:
    """One model in memory.

    `step()` trains on the same ids each time and returns the loss, a tensor or a number.
    """

    name: str
    step: Callable[[], Tensor | float]
    compiled: bool = False
    """Whether the first step waits for a compiler of a whole model."""


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
    kernels: dict[str, Any] | None = None,
) -> Contender:
    """k2train's engine as a contender."""
    engine = make_engine(grid, shape, batch, 1, kernels)
    ids = token_ids(bench.device, shape.vocab_size, batch)
    name = (
        "k2train"
        if not kernels
        else "k2train, " + ", ".join(f"{k} {v}" for k, v in kernels.items())
    )
    return Contender(name, lambda: engine.train_step(ids, LR).loss)


def transformers_model(work: Work) -> tuple[nn.Module, LossOf]:
    """LlamaForCausalLM with SDPA, and its loss of ids [sequences, length]."""
    made: tuple[nn.Module, LossOf] = optional("benchmarks.cpu.hugging_face").make_model(
        work, torch.bfloat16
    )
    return made


def reference_model(work: Work) -> tuple[nn.Module, LossOf]:
    """The hand-written LLaMA, and its loss."""
    model = Llama(work, dtype=torch.bfloat16)
    return model, loss_of(model)


MODELS = {"transformers": transformers_model, "reference": reference_model}


def peer_contenders(bench: Bench, name: str, shape: ModelShape, batch: Batch) -> list[Contender]:
    """A peer and the same peer compiled, sharing weights and optimizer so that both fit at once."""
    sizes = {key: value for key, value in asdict(shape).items() if key != "num_kv_heads"}
    work = Work(
        **sizes,
        sequence_length=batch.length_tokens,
        micro_sequences=batch.sequences,
        global_sequences=batch.sequences,
        lr=LR,
    )
    with torch.device(bench.device):
        model, loss = MODELS[name](work)
    found = size_of(model.parameters())
    assert found == parameters(shape), (
        f"{name} has {found} parameters, the shape {parameters(shape)}"
    )
    optimizer = FusedAdamW(work, model.parameters())
    ids = token_ids(bench.device, shape.vocab_size, batch)[0].tokens

    def stepper(loss: LossOf) -> Callable[[], Tensor]:
        def step() -> Tensor:
            found = loss(ids)
            found.backward()
            optimizer.step()
            return found.detach()

        return step

    # A dry run traces and splits the same, but waits for no compiler.
    backend = "aot_eager" if bench.dry else "inductor"
    compiled = torch.compile(loss, dynamic=False, backend=backend)
    return [
        Contender(name, stepper(loss)),
        Contender(f"{name} compiled", stepper(compiled), True),
    ]
