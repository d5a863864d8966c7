"""Trainer against an independent reference: a loop of a few lines over the chunk files."""

from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from k2train.config.load import Config
from k2train.launch.environment import Launch
from tests.support.gloo_pool import GlooPool
from tests.support.recorded import step_rows
from tests.support.tiny_corpus import GLOBAL, STEPS_PER_CHUNK, config_tree, make_corpus, trainer_job
from tests.support.tiny_model import engine_of, grid_of, split

CHUNKS = 2
WARMUP = 3


def rate_by_hand(step: int, peak: float, final: float) -> float:
    """Linear to the peak at step 3, then half a cosine to `final` at the last step."""
    if step <= WARMUP:
        return peak * (step / WARMUP)
    done = (step - WARMUP) / (CHUNKS * STEPS_PER_CHUNK - WARMUP)
    return final + (peak - final) * 0.5 * (1 + cos(pi * done))


def plain_loop(
    launch: Launch, tree: dict[str, Any], folder: str
) -> tuple[list[tuple[float, float]], dict[str, np.ndarray]]:
    """Chunk by chunk, row by row, at the rates computed by hand: (loss, norm) of every step, and
    the master weights.
    """
    config = Config.model_validate(tree)
    engine = engine_of(config, grid_of(launch, config))
    results = []
    for index in range(CHUNKS):
        tokens = np.load(Path(folder) / f"chunk_{index:03d}.npy").astype(np.int64)
        for within in range(STEPS_PER_CHUNK):
            rows = torch.from_numpy(tokens[within * GLOBAL : (within + 1) * GLOBAL])
            lr = rate_by_hand(len(results) + 1, config.lr.peak, config.lr.final)
            result = engine.train_step(split(config, rows), lr)
            results.append((result.loss, result.grad_norm))
    slots = engine.gradients.shard_layout.slots
    return results, {
        slot.param_slice.name: engine.optimizer.view("master", slot).numpy().copy()
        for slot in slots
    }


def test_trainer_equals_a_plain_loop(pool: GlooPool, tmp_path: Path) -> None:
    """The rows of each step, the rate logged and the rate used: a run compared with itself would
    miss all three.
    """
    make_corpus(tmp_path / "data", chunks=CHUNKS)
    tree = config_tree(
        tmp_path / "data" / "manifest.json", tmp_path / "runs", "run", lr__warmup_steps=WARMUP
    )
    assert pool.run(1, trainer_job, tree) == [0]
    ((results, masters),) = pool.run(1, plain_loop, tree, str(tmp_path / "data"))
    run = tmp_path / "runs" / "run"
    rows = step_rows(run / "metrics.jsonl")
    assert [(row["loss"], row["grad_norm"]) for row in rows] == results
    expected = [
        rate_by_hand(step, tree["lr"]["peak"], tree["lr"]["final"])
        for step in range(1, len(rows) + 1)
    ]
    assert [row["lr"] for row in rows] == expected
    (shard,) = (run / "checkpoints" / f"ckpt_{CHUNKS:03d}" / "optimizer").iterdir()
    saved = load_file(shard)
    for name, master in masters.items():
        assert np.array_equal(saved[f"{name}.master"], master), name
