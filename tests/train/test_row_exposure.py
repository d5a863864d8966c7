"""Losses of rows and subsets: what they are, on every layout, and that they change no bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2train.checkpoint.manifest import read_manifest
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.trace.row_losses import RowLosses
from k2train.record.exposure import exposure_lines, exposures, kept_records
from k2train.record.metrics import StepRecord, latest
from k2train.train.row_exposure import by_subset
from tests.support.data_folder import add_chunk, finish
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import GLOBAL, SEQUENCE, VOCAB, config_tree, trainer_job

ROWS = 3 * GLOBAL
KINDS = ["code", "web", "web"] * (ROWS // 3)


def pieces_of(kinds: list[str]) -> dict[str, list[Any]]:
    rows = len(kinds)
    same = {"start": 0, "length": SEQUENCE, "source": "s", "document": "d", "offset": 0}
    columns = {key: [value] * rows for key, value in same.items()}
    return {"row": list(range(rows)), "subset": kinds, **columns}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`: a chunk of two subsets. `first`: the rows of its first step, to be scored."""
    folder = tmp_path_factory.mktemp("exposure")
    ids = np.random.default_rng(9).integers(0, VOCAB, (ROWS, SEQUENCE))
    for name, rows in (("data", ROWS), ("first", GLOBAL)):
        (folder / name).mkdir()
        kinds = KINDS[:rows]
        subsets = {kind: kinds.count(kind) * SEQUENCE for kind in ("code", "web")}
        pieces = pieces_of(kinds)
        info = add_chunk(folder / name, "chunk_000", ids[:rows], VOCAB, subsets, pieces=pieces)
        finish(folder / name, [info], SEQUENCE, VOCAB)
    return folder


def tree(base: Path, name: str, on: bool, **changes: Any) -> dict[str, Any]:
    changes = {"lr": {"kind": "constant", "peak": 1e-2}, **changes}
    changes = {"audit__subset_losses": on, "audit__row_losses": on, **changes}
    return config_tree(base / "data" / "manifest.json", base / "runs", name, **changes)


def metrics(base: Path, name: str) -> list[StepRecord]:
    return latest(base / "runs" / name / "metrics.jsonl")


def losses(base: Path, name: str, step: int) -> list[float | None]:
    found = RowLosses(base / "runs" / name, GLOBAL)
    return [found.of(1, step, row) for row in range(GLOBAL)]


def test_losses_are_those_of_an_evaluation(base: Path, pool: GlooPool) -> None:
    """The first step's, with the initial weights: catches a wrong divisor, rows in another order,
    subsets that are mixed up, and losses of a step before.
    """
    scored = {"data__held_out_sets": {"first": str(base / "first")}}
    assert pool.run(1, trainer_job, tree(base, "one", True, **scored)) == [0]
    first = metrics(base, "one")[0]
    checkpoint = read_manifest(base / "runs" / "one" / "checkpoints" / "ckpt_000")
    (score,) = checkpoint.held_out or ()
    assert first.subsets is not None
    assert [(name, tokens) for name, (tokens, _) in first.subsets.items()] == [
        ("code", 4 * SEQUENCE),
        ("web", 8 * SEQUENCE),
    ]
    for part in score.subsets:
        assert first.subsets[part.name][1] == pytest.approx(part.loss, rel=1e-6)
    for record in metrics(base, "one"):
        rows = losses(base, "one", record.step)
        mean = sum(row or 0.0 for row in rows) / (GLOBAL * (SEQUENCE - 1))
        assert mean == pytest.approx(record.loss, rel=1e-6)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data-3": (3, {"batch__micro_sequences": 2}),
    "zb-v": (2, {"parallel__pipeline": 2, "parallel__schedule": "zb-v"}),
    "tensor-2-pipeline-2": (
        4,
        {"parallel__tensor": 2, "parallel__pipeline": 2, "kernels__loss": "reference"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_on_every_layout_and_no_other_bit(base: Path, pool: GlooPool, name: str) -> None:
    """Catches rows that are counted twice or missing on a layout, and a key that changes the last
    bits of loss, norm or weights: with three ranks the length of an exchange would.
    """
    world, changes = LAYOUTS[name]
    changes = {**changes, "audit__root_every_steps": 1, "data__held_out_rows": 0}
    for on in (False, True):
        settings = tree(base, f"{name}-{on}", on, **changes)
        assert pool.run(world, trainer_job, settings) == [0] * world

    off, on_ = metrics(base, f"{name}-False"), metrics(base, f"{name}-True")
    assert [record.subsets for record in off] == [None] * 3
    keys = ("loss", "grad_norm", "state_root", "ids")
    for one, other in zip(off, on_, strict=True):
        assert all(getattr(one, key) == getattr(other, key) for key in keys)
        assert other.subsets is not None
        tokens = sum(count for count, _ in other.subsets.values())
        mean = sum(count * loss for count, loss in other.subsets.values()) / tokens
        assert (tokens, mean) == (GLOBAL * SEQUENCE, pytest.approx(other.loss, rel=1e-6))

    # Of the one process of the first test, but for rounding.
    if (base / "runs" / "one").exists():
        for step in (1, 3):
            expected = losses(base, "one", step)
            assert losses(base, f"{name}-True", step) == pytest.approx(expected, rel=1e-4)


def test_a_run_without_provenance_goes_on(base: Path, pool: GlooPool) -> None:
    """Catches a run that ends because of a file that no part of it depends on."""
    manifest = read_data_manifest(base / "data")
    path = manifest.folder / str(manifest.chunks[0].provenance)
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    try:
        settings = tree(base, "damaged", True, data__held_out_rows=0)
        assert pool.run(1, trainer_job, settings) == [0]
    finally:
        path.write_bytes(content)
    assert [record.subsets for record in metrics(base, "damaged")] == [None] * 3
    assert None not in losses(base, "damaged", 3)


def test_a_loss_that_is_no_number_stays_with_its_subset() -> None:
    """Catches an error, and a loss of one subset that spoils those of the others."""
    found = by_subset([2.0, float("nan"), 4.0], [2, 2, 2], ["a", "b", "a"], 3)
    assert found["a"] == (6, 1.5) and found["b"][0] == 3 and found["b"][1] != found["b"][1]


def record(step: int, attempt: int, chunk: str, loss: float, **other: Any) -> str:
    row = {"step": step, "attempt": attempt, "chunk": chunk, "loss": loss}
    return json.dumps({**row, "consumed_tokens": step * 10, **other}) + "\n"


def test_exposure_by_chunk_and_subset(tmp_path: Path) -> None:
    """Catches steps that were undone or skipped, a mean of means, and words for numbers."""
    path = tmp_path / "metrics.jsonl"
    assert kept_records(path) == [] and exposure_lines([]) == ["no step yet"]
    path.write_text(
        record(1, 1, "chunk_000", 5.0, subsets={"a": [8, 6.0], "b": [2, 1.0]})
        + record(2, 1, "chunk_000", 9.0, subsets={"a": [10, 9.0]})
        + record(4, 1, "chunk_001", 9.0)
        + record(2, 2, "chunk_000", 4.0, subsets={"a": [2, 3.0], "b": [8, "inf"]})
        + record(3, 2, "chunk_001", 3.0, applied=False)
    )
    found = {(one.chunk, one.subset): one for one in exposures(kept_records(path))}
    assert set(found) == {("chunk_000", name) for name in ("all", "a", "b")}
    whole, part = found["chunk_000", "all"], found["chunk_000", "a"]
    assert (whole.steps, whole.tokens, whole.loss) == (2, 20, 4.5)
    assert (part.tokens, part.loss, part.first_loss, part.last_loss) == (10, 5.4, 6.0, 3.0)
    assert found["chunk_000", "b"].loss == float("inf")
    lines = "\n".join(exposure_lines(kept_records(path)))
    assert "all chunks" in lines and "chunk_001" not in lines
