"""Names of a LLaMA's tensors in Hugging Face's transformers, by this project's names.

- Both store a matrix as [out, in], and both rotate halves: only names differ, no value moves.

Alternatives considered:
- Renaming by rules: three of the nine names of a layer follow none.
"""

LAYER_PARTS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
"""Modules of a layer."""
ENDS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
"""Modules outside of the layers."""


def transformers_name(name: str) -> str:
    """Return a tensor's name in transformers' LLaMA: `layers.0.mlp.up.weight` is one of ours."""
    stem = name.removesuffix(".weight")
    if stem in ENDS:
        return f"{ENDS[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{LAYER_PARTS[part]}.weight"
