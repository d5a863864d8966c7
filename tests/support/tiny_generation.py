"""A tiny trained run to generate from, and the same model in transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.hf.names import transformers_name
from k2train.inference.prompts import Prompt
from k2train.inference.source import Source
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, trainer_job

PIECES, MODEL_VOCAB = 290, 320
CONTEXT = 48
"""Longer than the 16 of the tiny training: the comparisons need more positions."""


def tiny_tokenizer() -> Tokenizer:
    words = ["the cat sat on the mat", "a dog ran to the cat", "wer reitet so spät", "ça va, été"]
    return train_tokenizer([" ".join(words), *words] * 4, PIECES)


def tiny_run(pool: GlooPool, base: Path) -> Path:
    """Directory of a run with grouped heads, trained on tensor 2 x pipeline 2."""
    tokenizer = tiny_tokenizer()
    data = base / "data"
    make_corpus(data, 1, vocab=tokenizer.vocab_size, tokenizer=tokenizer.sha256, held_out=False)
    tokenizer.save(data / "tokenizer.model")
    tree = config_tree(
        data / "manifest.json",
        base / "runs",
        "spoken",
        model__num_kv_heads=2,
        model__vocab_size=MODEL_VOCAB,
        model__rope_theta=500.0,
        parallel__tensor=2,
        parallel__pipeline=2,
    )
    assert pool.run(4, trainer_job, tree) == [0] * 4
    return base / "runs" / "spoken"


def tiny_source(run: Path, context: int = CONTEXT) -> Source:
    return replace(Source.find(run), context_tokens=context)


def peer_of(source: Source) -> Any:
    """LlamaForCausalLM with the checkpoint's weights, read and assembled here, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    a = source.architecture
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=a.vocab_size,
            hidden_size=a.hidden_size,
            intermediate_size=a.ffn_hidden_size,
            num_hidden_layers=a.num_layers,
            num_attention_heads=a.num_heads,
            num_key_value_heads=a.num_kv_heads,
            max_position_embeddings=source.context_tokens,
            rope_parameters={"rope_type": "default", "rope_theta": a.rope_theta},
            rms_norm_eps=a.norm_eps,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()
    state = model.state_dict()
    seen = dict.fromkeys(state, 0)
    for file in sorted((source.path / "model").iterdir()):
        with safe_open(file, "pt") as opened:
            facts = opened.metadata()
            for key in opened.keys():  # noqa: SIM118
                block = opened.get_tensor(key)
                offsets = _offsets(facts, key)
                index = tuple(
                    slice(low, low + size) for low, size in zip(offsets, block.shape, strict=True)
                )
                name = transformers_name(key)
                state[name][index] = block
                seen[name] += block.numel()
    assert seen == {name: tensor.numel() for name, tensor in state.items()}
    model.load_state_dict(state)
    return model


def _offsets(facts: dict[str, str], key: str) -> list[int]:
    import json

    offsets: list[int] = json.loads(facts["DCP_SHARDING_INFO"])[key]["saved_offsets"]
    return offsets


def prompts_of(lengths: list[int], vocab: int = PIECES, seed: int = 5) -> list[Prompt]:
    """Prompts of random ids of these lengths, none of them a control token."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(index, "", tuple(torch.randint(3, vocab, (n,), generator=generator).tolist()))
        for index, n in enumerate(lengths)
    ]
