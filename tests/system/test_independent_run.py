"""Whole runs, from YAML to metrics and checkpoints, against a training loop that shares no code.

- The loop is Hugging Face's model, torch's AdamW and clipping, NumPy for chunks and checkpoints,
  and the formulas of the schedule written out here.
- Every key that changes a number has a value other than its default, so a key that is not handed
  on shows.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from k2train.hf.names import transformers_name
from tests.model.test_hugging_face import hugging_face
from tests.support.gloo_pool import GlooPool
from tests.support.recorded import step_rows
from tests.support.tiny_corpus import (
    GLOBAL,
    SEQUENCE,
    STEPS_PER_CHUNK,
    config_tree,
    make_corpus,
    trainer_job,
)
from tests.support.tiny_model import tiny_config

PEAK, FINAL, WARMUP, DECAY = 8e-3, 1.7e-3, 3, 4
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.8, 0.97), 1e-3, 0.45, 1.9
ORDER = [2, 0]
STEPS = len(ORDER) * STEPS_PER_CHUNK
SETTINGS: dict[str, Any] = {
    "run__seed": 11,
    "model__num_kv_heads": 2,
    "model__rope_theta": 300.0,
    "model__norm_eps": 2e-3,
    "model__init_std": 0.17,
    "data__order": ORDER,
    "optimizer": {
        "betas": list(BETAS),
        "eps": EPS,
        "weight_decay": WEIGHT_DECAY,
        "clip_norm": CLIP,
    },
    "lr": {
        "kind": "wsd",
        "peak": PEAK,
        "final": FINAL,
        "warmup_steps": WARMUP,
        "decay_steps": DECAY,
    },
    "checkpoint": {"keep_optimizer_states": 2, "every_seconds": 0},
}
# Of ten steps in fp32 by other kernels, relative.
TOLERANCE = 2e-5


@dataclass
class Reference:
    """What the independent loop came to."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    held_out: float


def rate(step: int, steps: int) -> float:
    """Warm-up from 0, then the peak, then a straight line to the final rate at the last step."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    left = steps - step
    return PEAK if left >= DECAY else FINAL + (PEAK - FINAL) * left / DECAY


def weights_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint by name: data-parallel ranks write blocks of rows, in their order."""
    files = [load_file(path) for path in sorted((checkpoint / "model").glob("*.safetensors"))]
    return {name: np.concatenate([file[name] for file in files]) for name in files[0]}


def batches_of(data: Path, order: list[int], steps: int) -> Iterator[torch.Tensor]:
    """Rows of each step in their order: the last three of a chunk fill no step."""
    chunks = [np.load(data / f"chunk_{number:03d}.npy") for number in order]
    for step in range(steps):
        chunk, within = divmod(step, STEPS_PER_CHUNK)
        rows = chunks[chunk][within * GLOBAL : (within + 1) * GLOBAL]
        yield torch.from_numpy(rows.astype(np.int64))


def train_independently(
    data: Path, order: list[int], start: dict[str, np.ndarray], steps: int
) -> Reference:
    """Train from the weights `start` with fresh moments, over the first `steps` steps."""
    model = hugging_face(tiny_config(**SETTINGS), start, "sdpa")
    named = {name: dict(model.named_parameters())[transformers_name(name)] for name in start}
    matrices = [value for value in named.values() if value.dim() == 2]
    vectors = [value for value in named.values() if value.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=1.0,
        betas=BETAS,
        eps=EPS,
    )

    losses, norms = [], []
    for step, tokens in enumerate(batches_of(data, order, steps), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, len(order) * STEPS_PER_CHUNK)
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())

    held_out = torch.from_numpy(np.load(data / "held_out.npy").astype(np.int64))
    with torch.no_grad():
        held_out_loss = model(input_ids=held_out, labels=held_out).loss.item()
    weights = {name: value.detach().numpy() for name, value in named.items()}
    return Reference(losses, norms, weights, held_out_loss)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_run(run: Path, last: Path, found: Reference, start: dict[str, np.ndarray]) -> None:
    """Metrics and weights of a run are those of the loop."""
    rows = step_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(found.losses) + 1))
    for row, loss, norm in zip(rows, found.losses, found.norms, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=TOLERANCE), row["step"]
        assert row["grad_norm"] == pytest.approx(norm, rel=20 * TOLERANCE), row["step"]
        tokens = row["tokens_per_second"] * row["seconds"]
        assert tokens == pytest.approx(GLOBAL * SEQUENCE, rel=1e-9), "of all ranks together"

    saved = weights_of(last)
    assert saved.keys() == found.weights.keys()
    for name, value in found.weights.items():
        learned = value - start[name]
        error = np.abs(saved[name] - value).max() / np.abs(learned).max()
        assert error < 1e-3, f"what {name} learned: relative error {error:.1e}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("independent")
    make_corpus(folder / "data", chunks=4)
    return folder


def train(pool: GlooPool, base: Path, name: str, ranks: int, **changes: Any) -> Path:
    tree = config_tree(base / "data" / "manifest.json", base / "runs", name, **(SETTINGS | changes))
    codes = pool.run(ranks, trainer_job, tree)
    assert codes in ([0] * ranks, [75] * ranks), codes
    return base / "runs" / name


def checkpoint(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"ckpt_{number:03d}"


@pytest.mark.parametrize("ranks", (1, 2))
def test_a_run_is_that_of_an_independent_loop(pool: GlooPool, base: Path, ranks: int) -> None:
    """Catches a key that is checked and then not used, a schedule of another shape, rows of another
    step, a held-out loss by another mean.
    """
    run = train(pool, base, f"ranks_{ranks}", ranks)
    start = weights_of(checkpoint(run, 0))
    found = train_independently(base / "data", ORDER, start, STEPS)

    assert found.norms[0] > CLIP > min(found.norms), f"clipping must matter: {found.norms}"
    assert_run(run, checkpoint(run, len(ORDER)), found, start)
    rows = step_rows(run / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx(
        [rate(step, STEPS) for step in range(1, STEPS + 1)], rel=1e-12
    )

    saved = [row for row in lines_of(run / "ledger.jsonl") if row["event"] == "checkpoint_saved"]
    assert saved[-1]["held_out_loss"] == pytest.approx(found.held_out, rel=TOLERANCE)


def test_a_stage_that_starts_from_weights_alone_starts_its_moments_anew(
    pool: GlooPool, base: Path
) -> None:
    """Catches the count of updates that is kept where the moments are not: the first updates would
    be divided by the bias of many.
    """
    parent = train(
        pool, base, "parent", 1, data__order=[0, 1, 2], lr={"kind": "constant", "peak": 1e-2}
    )
    thinned = checkpoint(parent, 1)
    assert (thinned / "thinned.json").exists(), sorted(path.name for path in thinned.iterdir())

    run = train(
        pool,
        base,
        "child",
        1,
        data__order=[3, 0],
        run__init_from=str(thinned),
        data__seen_before="allow",
    )
    start = weights_of(thinned)
    found = train_independently(base / "data", [3, 0], start, STEPS)
    assert_run(run, checkpoint(run, 2), found, start)
