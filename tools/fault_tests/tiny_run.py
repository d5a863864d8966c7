"""Tiny run for fault tests: random ids in many short chunks, a two-layer model, and a YAML config.

- It saves every few steps, so a save is running much of the time, which is where faults hurt.
- Corpus and config are written by k2train's own writers and start through its command line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from k2train.data.chunk import write_chunk, write_manifest
from k2train.fault_injection import PERMISSION

SEQUENCE = 16
VOCAB = 61
GLOBAL = 4
MODEL = {
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": VOCAB,
    "init_std": 0.2,
}


@dataclass(frozen=True)
class TinyRun:
    """One corpus and one way to train on it; `run(name)` is the directory of a run."""

    folder: Path
    chunks: int
    steps_per_chunk: int
    ranks: int = 2
    layout: tuple[tuple[str, int], ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.chunks * self.steps_per_chunk

    @property
    def config(self) -> Path:
        """Path of the YAML config."""
        return self.folder / "config.yaml"

    @property
    def data(self) -> Path:
        """Path of the data folder."""
        return self.folder / "data"

    def run(self, name: str) -> Path:
        """Directory of the run of that name."""
        return self.folder / "runs" / name

    def arguments(self, name: str, *more: str) -> list[str]:
        """Command line of a run: config, name, layout, changes."""
        settings = [f"{key}={value}" for key, value in (*self.layout, *self.changes)]
        return [str(self.config), f"run.name={name}", *settings, *more]

    def on(self, ranks: int, **layout: Any) -> "TinyRun":
        """The same world on another grid: `on(4, tensor=2, pipeline=2)`."""
        return replace(
            self,
            ranks=ranks,
            layout=tuple((f"parallel.{axis}", size) for axis, size in layout.items()),
        )

    def changed(self, *settings: tuple[str, Any]) -> "TinyRun":
        """The same world with changed settings."""
        return replace(self, changes=(*self.changes, *settings))


def make_tiny_run(
    folder: Path,
    chunks: int,
    steps_per_chunk: int,
    ranks: int = 2,
    held_out: bool = False,
    seed: int = 5,
) -> TinyRun:
    """Write corpus and config into `folder`; both depend only on the arguments."""
    world = TinyRun(folder, chunks, steps_per_chunk, ranks)
    world.data.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(key=seed))
    rows = GLOBAL * steps_per_chunk

    def chunk(name: str, rows: int) -> Any:
        ids = rng.integers(0, VOCAB, (rows, SEQUENCE)).astype(np.uint16)
        return write_chunk(world.data, name, [ids], rows, VOCAB, {"noise": rows * SEQUENCE})

    infos = [chunk(f"chunk_{index:03d}", rows) for index in range(chunks)]

    write_manifest(
        world.data,
        tokenizer_sha256="f" * 64,
        sequence_length=SEQUENCE,
        vocab_size=VOCAB,
        chunks=infos,
        held_out=chunk("held_out", GLOBAL) if held_out else None,
    )

    world.config.write_text(yaml.safe_dump(tree_of(world), sort_keys=False), encoding="utf-8")
    return world


def tree_of(world: TinyRun) -> dict[str, Any]:
    """Config of the world as a tree."""
    return {
        "run": {
            "name": "undisturbed",
            "directory": str(world.folder / "runs"),
            "seed": 11,
            "max_fruitless_starts": 0,
            "allow": [PERMISSION],
        },
        "model": MODEL,
        "data": {"manifest": str(world.data / "manifest.json"), "sequence_length": SEQUENCE},
        "batch": {"global_sequences": GLOBAL, "micro_sequences": 1},
        "lr": {"kind": "cosine", "peak": 1e-2, "final": 1e-3, "warmup_steps": 3},
        "optimizer": {"eps": 1e-4},
        "precision": "fp32",
        "kernels": {"compile": "off"},
        "checkpoint": {
            "keep_optimizer_states": 3,
            "retry_seconds": 2.0,
            "verify_every_seconds": 0.0,
        },
        "watch": {"heartbeat_seconds": 0.2, "start_seconds": 60.0},
        "audit": {"replicas_every_steps": 2, "root_every_steps": 1},
    }


GRIDS: Sequence[tuple[int, dict[str, int]]] = ((2, {}), (4, {"tensor": 2, "pipeline": 2}))
"""Ranks and axes of the runs that are killed: two data-parallel ranks; tensor and pipeline
parallel.
"""
