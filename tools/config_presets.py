"""Configs of usual model sizes, written complete from a few values each: `configs/presets/*.yaml`.

- Not a command: `python tools/config_reference.py` writes the files. A key that is added to the
  schema and to `configs/demo/stage1.yaml` comes into all of them by that.
- A file has the keys and comments of the demo's, the preset's values, and defaults for the rest.
- Shapes are public ones: LLaMA's layers in the size of Pythia-160M (arXiv:2304.01373), TinyLlama
  1.1B (arXiv:2401.02385), Llama 3 8B and 70B (arXiv:2407.21783), K2-V2 (arXiv:2512.06201, and its
  published pre-training script). Batches and rates are near theirs.
- Layouts are for devices of 80 GB, or what the preset says. A test plans each of them.

Alternatives considered:
- Files that inherit from one: a reader would have to put a config together in their head.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from k2train.config.scalars import format_value
from k2train.config.schema import Config, flat_values

KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: (?P<rest>.*))?")


class Preset(NamedTuple):
    """A config in short."""

    title: str
    """First line of the file: the model, and how many devices it is for."""
    worlds: tuple[int, ...]
    """Numbers of devices that it is for."""
    values: Mapping[str, Mapping[str, Any]]
    """Values by section and key."""
    comments: Mapping[str, str] = {}
    """Comments by dotted key that replace those of the demo."""
    device_gb: int = 80
    """Memory of the devices that its layout is for, GB."""


LLAMA_3_VOCABULARY = "rows of the embedding: 128,000 pieces and 256 special and spare ones"

PRESETS = {
    "llama_160m": Preset(
        "160M parameters, on 1, 2, 4 or 8 GPUs (data parallel).",
        (1, 2, 4, 8),
        {
            "model": {
                "num_layers": 12,
                "hidden_size": 768,
                "ffn_hidden_size": 2048,
                "num_heads": 12,
                "vocab_size": 50304,
            },
            "data": {"sequence_length": 2048},
            "batch": {"global_sequences": 256, "micro_sequences": 16},
            "lr": {"peak": 6.0e-4, "final": 6.0e-5, "warmup_steps": 2000},
        },
        {
            "batch.global_sequences": "sequences of a step, over all processes: 524,288 tokens",
        },
    ),
    "llama_1b": Preset(
        "1.1B parameters (the shape of TinyLlama), on 8 GPUs (data parallel).",
        (8,),
        {
            "model": {
                "num_layers": 22,
                "hidden_size": 2048,
                "ffn_hidden_size": 5632,
                "num_heads": 32,
                "num_kv_heads": 4,
                "vocab_size": 32000,
            },
            "data": {"sequence_length": 2048},
            "batch": {"global_sequences": 1024, "micro_sequences": 8},
            "lr": {"peak": 4.0e-4, "final": 4.0e-5, "warmup_steps": 2000},
        },
        {
            "batch.global_sequences": "sequences of a step, over all processes: 2,097,152 tokens",
        },
    ),
    "llama_8b": Preset(
        "8B parameters (the shape of Llama 3 8B), on 64 GPUs (tensor 2, data 32).",
        (64,),
        {
            "model": {
                "num_layers": 32,
                "hidden_size": 4096,
                "ffn_hidden_size": 14336,
                "num_heads": 32,
                "num_kv_heads": 8,
                "vocab_size": 128256,
                "rope_theta": 500000.0,
            },
            "data": {"sequence_length": 8192},
            "batch": {"global_sequences": 512, "micro_sequences": 1},
            "parallel": {"tensor": 2},
            "lr": {"peak": 3.0e-4, "final": 3.0e-5, "warmup_steps": 2000},
        },
        {
            "model.vocab_size": LLAMA_3_VOCABULARY,
            "batch.global_sequences": "sequences of a step, over all processes: 4,194,304 tokens",
        },
    ),
    "llama_70b": Preset(
        "70B parameters (the shape of Llama 3 70B), on 512 GPUs (tensor 8, pipeline 4, data 16).",
        (512,),
        {
            "model": {
                "num_layers": 80,
                "hidden_size": 8192,
                "ffn_hidden_size": 28672,
                "num_heads": 64,
                "num_kv_heads": 8,
                "vocab_size": 128256,
                "rope_theta": 500000.0,
            },
            "data": {"sequence_length": 8192},
            "batch": {"global_sequences": 1024, "micro_sequences": 1},
            "parallel": {"tensor": 8, "pipeline": 4, "layers_per_stage": [21, 20, 20, 19]},
            "lr": {"peak": 1.5e-4, "final": 1.5e-5, "warmup_steps": 2000},
        },
        {
            "model.vocab_size": LLAMA_3_VOCABULARY,
            "batch.global_sequences": "sequences of a step, over all processes: 8,388,608 tokens",
        },
    ),
    "k2_v2": Preset(
        "73B parameters (the shape of K2-V2), on 3200 GPUs of 141 GB (tensor 8, data 400).",
        (3200,),
        {
            "model": {
                "num_layers": 80,
                "hidden_size": 8192,
                "ffn_hidden_size": 28672,
                "num_heads": 64,
                "num_kv_heads": 8,
                "vocab_size": 250112,
                "rope_theta": 500000.0,
                "init_std": 0.01,
            },
            "data": {"sequence_length": 8192},
            "batch": {"global_sequences": 1200, "micro_sequences": 3},
            "parallel": {"tensor": 8},
            "kernels": {"recompute": "full"},
            "optimizer": {"weight_decay": 0.05},
            "lr": {"peak": 1.5e-4, "final": 0.0, "warmup_steps": 2000},
        },
        {
            "model.vocab_size": "rows of the embedding: about 250,000 pieces, and spare ones",
            "batch.global_sequences": "sequences of a step, over all processes: 9,830,400 tokens",
        },
        device_gb=141,
    ),
}
"""Presets by the name of their file and of their run."""


def preset_tree(name: str) -> dict[str, Any]:
    """Return the values of a preset, with what every preset has."""
    common: dict[str, dict[str, Any]] = {
        "run": {"name": name.replace("_", "-"), "seed": 1},
        "data": {"manifest": f"data/{name}/manifest.json", "held_out_rows": 1024},
        "lr": {"kind": "cosine"},
    }
    own = PRESETS[name].values
    tree: dict[str, Any] = {"precision": "bf16"}
    return tree | {
        section: {**common.get(section, {}), **own.get(section, {})}
        for section in {**common, **own}
    }


def preset_text(name: str, example: str) -> str:
    """Return the file of a preset: the lines of `example` with its values and comments."""
    preset = PRESETS[name]
    values = flat_values(Config.model_validate(preset_tree(name)))
    lines = [f"# {preset.title}", "# Complete by itself: no other file is read."]
    section = ""
    for line in example.splitlines():
        written = KEY.fullmatch(line)
        if line.startswith("#") or line.lstrip().startswith("#"):
            continue
        if written is None or written["rest"] is None:
            section = written["key"] if written else section
            lines.append(line)
            continue
        key = f"{section}.{written['key']}" if written["indent"] else written["key"]
        comment = preset.comments.get(key) or written["rest"].partition("  # ")[2]
        lines.append(f"{written['indent']}{written['key']}: {_text(values[key])}  # {comment}")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    """Format a value; a small number as 3.0e-4."""
    if isinstance(value, float) and 0 < value < 0.01:
        short = f"{value:.1e}".replace("e-0", "e-")
        if float(short) == value:
            return short
    return format_value(value)
