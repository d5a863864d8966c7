"""Small Hugging Face folders and checkpoints, and independent readers of both."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
MARKERS = ("<|endofsystemprompt|>", "<|beginofuser|>", "<|beginofsystem|>", "<|endofchat|>")
K2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    "<|endofsystemprompt|>"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|beginofuser|>{{ m['content'] }}<|beginofsystem|>"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
    "{% if not add_generation_prompt %}<|endofchat|>{% endif %}"
)


def llama(seed: int = 3, **changes: Any) -> Any:
    """A tiny LlamaForCausalLM with random weights, every one of them different from zero."""
    import transformers

    values: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    values |= changes
    # Version 4 has them apart.
    rope = dict(values["rope_parameters"])
    values["rope_theta"] = rope.pop("rope_theta")
    if rope != {"rope_type": "default"}:
        values["rope_scaling"] = rope
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def saved(folder: Path, model: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save a model as transformers does."""
    model.to(dtype).save_pretrained(folder, **options)
    model.float()
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by the reader of safetensors itself."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            found |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return found


def checkpoint_tensors(path: Path, folder: str = "model") -> dict[str, np.ndarray]:
    """Whole tensors of a checkpoint, put together from the files' own offsets."""
    shapes = json.loads((path / "manifest.json").read_text())["tensors"][folder]
    whole = {name: np.full(facts["shape"], np.nan, np.float32) for name, facts in shapes.items()}
    for file in sorted((path / folder).glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            places = json.loads(stream.metadata()["DCP_SHARDING_INFO"])
            for name in stream.keys():  # noqa: SIM118
                values = stream.get_tensor(name).float().numpy()
                offsets = places[name]["saved_offsets"]
                box = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
                whole[name][box] = values
    return whole


def write_tree(path: Path, tree: dict[str, Any]) -> Path:
    """Write a config as YAML, which JSON is."""
    path.write_text(json.dumps(tree))
    return path
