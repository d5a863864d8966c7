"""Hugging Face contender: LlamaForCausalLM with SDPA in one process, its own loss, fused AdamW."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cpu.contract import Built
from benchmarks.cpu.llama import DTYPES, FusedAdamW, global_batch, size_of
from benchmarks.cpu.work import Work


def build(work: Work, precision: str, options: Mapping[str, Any], rank: int, world: int) -> Built:
    """Build the same sizes under transformers' names."""
    torch.manual_seed(work.seed)
    config = LlamaConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=work.ffn_hidden_size,
        num_hidden_layers=work.num_layers,
        num_attention_heads=work.num_heads,
        max_position_embeddings=work.sequence_length,
        rms_norm_eps=work.norm_eps,
        initializer_range=work.init_std,
        use_cache=False,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )

    model = LlamaForCausalLM(config).to(DTYPES[precision]).train()
    optimizer = FusedAdamW(work, model.parameters())
    parts = global_batch(work).split(work.micro_sequences)

    def step() -> float:
        total = 0.0
        for tokens in parts:
            loss = model(input_ids=tokens, labels=tokens).loss / len(parts)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        return total

    return Built(step, size_of(model.parameters()))
