"""Tiny runs that spike: a learned pattern, and a chunk whose ids are shuffled, at a high rate."""

from pathlib import Path
from typing import Any

import numpy as np

from k2train.data.chunk import write_chunk, write_manifest

VOCAB, SEQUENCE, GLOBAL = 64, 16, 8
FIRST, POISONED, LAST = 70, 95, 30
"""Steps of the three chunks: enough for a baseline, and for a verdict behind the second one."""
ONSET = FIRST + 1
VERDICT = FIRST + 100


def pattern(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Rows that count up by three, a tenth of their ids drawn at random."""
    rows = GLOBAL * steps
    ids = (rng.integers(0, VOCAB, (rows, 1)) + 3 * np.arange(SEQUENCE)) % VOCAB
    return np.where(rng.random(ids.shape) < 0.1, rng.integers(0, VOCAB, ids.shape), ids)


def spiked_corpus(folder: Path, bad_steps: int = POISONED) -> Path:
    """A data folder of three chunks; the first `bad_steps` of the second one are shuffled."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(key=3))
    infos = []
    for number, steps in enumerate((FIRST, POISONED, LAST)):
        ids = pattern(rng, steps)
        if number == 1:
            bad = ids[: GLOBAL * bad_steps]
            bad[:] = rng.permutation(bad.ravel()).reshape(bad.shape)
        infos.append(
            write_chunk(
                folder,
                f"chunk_{number:03d}",
                [ids.astype(np.uint16)],
                len(ids),
                VOCAB,
                {"noise": ids.size},
            )
        )
    write_manifest(
        folder,
        tokenizer_sha256="t" * 64,
        sequence_length=SEQUENCE,
        vocab_size=VOCAB,
        chunks=infos,
        held_out=None,
    )
    return folder / "manifest.json"


def spiked_tree(manifest: Path, directory: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Config of a run over it, `spikes.policy=rollback_and_defer`; changes as in `config_tree`."""
    tree: dict[str, Any] = {
        "run": {"name": name, "directory": str(directory), "seed": 7},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_heads": 4,
            "num_kv_heads": 4,
            "vocab_size": VOCAB,
            "init_std": 0.1,
        },
        "data": {"manifest": str(manifest), "sequence_length": SEQUENCE},
        "batch": {"global_sequences": GLOBAL, "micro_sequences": 4},
        "parallel": {"tensor": 1, "pipeline": 1},
        "lr": {"kind": "constant", "peak": 1e-2},
        "optimizer": {"eps": 1e-4},
        "precision": "fp32",
        "checkpoint": {"every_seconds": 0},
        "spikes": {"policy": "rollback_and_defer"},
        "watch": {"heartbeat_seconds": 0},
    }
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        tree.setdefault(section, {})[inner] = value
    return tree
