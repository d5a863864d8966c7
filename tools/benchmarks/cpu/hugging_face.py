"""Hugging Face contender: LlamaForCausalLM with SDPA in one process, its own loss, fused AdamW."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cpu.contract import Built
from benchmarks.cpu.llama import DTYPES, LossOf, global_batch, trained
from benchmarks.cpu.work import Work


def build(work: Work, precision: str, options: Mapping[str, Any], rank: int, world: int) -> Built:
    """One process, all micro-batches of the global batch in turn."""
    torch.manual_seed(work.seed)
    model, loss_of = make_model(work, DTYPES[precision])
    return trained(model, loss_of, global_batch(work), work)


def make_model(work: Work, dtype: torch.dtype) -> tuple[LlamaForCausalLM, LossOf]:
    """The same sizes under transformers' names, and the loss of that model."""
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
    model = LlamaForCausalLM(config).to(dtype).train()
    return model, lambda ids: model(input_ids=ids, labels=ids).loss
