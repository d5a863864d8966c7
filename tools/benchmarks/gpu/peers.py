"""Contenders on whole models: k2train, transformers and the hand-written reference, also compiled.

- All train the same shape on the same ids with a fused AdamW at the same rate.
- k2train keeps fp32 master weights, moments and gradients (18 bytes per parameter).
- The peers update bf16 weights with bf16 moments (8 bytes), as such scripts do. That is less memory
  and fewer bytes to move, to their advantage.
- k2train clips the gradient norm; the peers do not.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, UnavailableError
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
        raise UnavailableError(f"{name} cannot be imported: {error}") from None


def k2train_contender(
    bench: Bench,
    grid: ProcessGrid,
    shape: ModelShape,
    batch: Batch,
    kernels: dict[str, Any] | None = None,
) -> Contender:
    """k2train's engine as a contender."""
    engine = make_engine(grid, shape, batch, 1, kernels)
    ids = token_ids(bench.device, shape, batch)
    name = (
        "k2train"
        if not kernels
        else "k2train, " + ", ".join(f"{k} {v}" for k, v in kernels.items())
    )
    return Contender(name, lambda: engine.train_step(ids, LR).loss)


def transformers_model(
    bench: Bench, shape: ModelShape, batch: Batch
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """LlamaForCausalLM with SDPA, and its loss of ids [sequences, length]."""
    package = optional("transformers")
    settings = package.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=batch.length_tokens,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )

    with torch.device(bench.device):
        model = package.LlamaForCausalLM(settings).to(torch.bfloat16).train()
    return model, lambda ids: model(input_ids=ids, labels=ids).loss


def reference_model(
    bench: Bench, shape: ModelShape, batch: Batch
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The hand-written LLaMA, and its loss."""
    llama, works = optional("benchmarks.cpu.llama"), optional("benchmarks.cpu.work")
    work = works.Work(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_heads=shape.num_heads,
        vocab_size=shape.vocab_size,
        sequence_length=batch.length_tokens,
        micro_sequences=batch.sequences,
        global_sequences=batch.sequences,
        lr=LR,
    )

    with torch.device(bench.device):
        model = llama.Llama(work, dtype=torch.bfloat16)
    return model, lambda ids: llama.mean_loss(model(ids), llama.labels_of(ids))


MODELS = {"transformers": transformers_model, "reference": reference_model}


def peer_contenders(bench: Bench, name: str, shape: ModelShape, batch: Batch) -> list[Contender]:
    """A peer and the same peer compiled, sharing weights and optimizer so that both fit at once."""
    model, loss_of = MODELS[name](bench, shape, batch)
    found = sum(p.numel() for p in model.parameters())
    assert found == parameters(shape), (
        f"{name} has {found} parameters, the shape {parameters(shape)}"
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = token_ids(bench.device, shape, batch)[0]

    def stepper(loss_of: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def step() -> Tensor:
            loss = loss_of(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    # A dry run traces and splits the same, but waits for no compiler.
    backend = "aot_eager" if bench.dry else "inductor"
    compiled = torch.compile(loss_of, dynamic=False, backend=backend)
    return [
        Contender(name, stepper(loss_of)),
        Contender(f"{name} compiled", stepper(compiled), True),
    ]
