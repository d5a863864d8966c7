"""Notes on absurd settings: said where they hold, with numbers and the better setting."""

from pathlib import Path
from typing import Any

import pytest

from k2train.config.load import Config
from k2train.train import start_notes
from k2train.train.held_out_sets import held_out_sets
from k2train.train.preflight import check_data
from k2train.train.start_notes import (
    bf16_note,
    determinism_change,
    determinism_note,
    evaluation_note,
)
from tests.support.tiny_corpus import config_tree, make_corpus, train, write_yaml
from tests.support.tiny_model import tiny_config


def tree_of(base: Path, **changes: Any) -> dict[str, Any]:
    if not (base / "data").exists():
        make_corpus(base / "data", 2)
    return config_tree(base / "data" / "manifest.json", base / "runs", "a", **changes)


@pytest.mark.parametrize(
    ("precision", "instructions", "accelerator", "on_cpu", "words"),
    (
        ("bf16", False, False, True, "emulated"),
        ("bf16", False, False, None, "no accelerator is seen here"),
        ("bf16", False, True, None, ""),
        ("bf16", False, True, False, ""),
        ("bf16", True, False, True, ""),
        ("bf16", None, False, True, ""),
        ("fp32", False, False, True, ""),
    ),
)
def test_emulated_bf16_is_told(
    precision: str,
    instructions: bool | None,
    accelerator: bool,
    on_cpu: bool | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a silent run that is ten times slower, and a note to people with a GPU."""
    monkeypatch.setattr(start_notes, "cpu_has_bf16", lambda: instructions)
    monkeypatch.setattr(start_notes, "has_accelerator", lambda: accelerator)
    tree = tree_of(tmp_path, precision=precision)
    assert bf16_note(Config.model_validate(tree), on_cpu) == "", "auto does not emulate"
    config = Config.model_validate(tree | {"kernels": {"matmul": "torch"}})
    note = bf16_note(config, on_cpu)
    assert (words in note and "precision=fp32" in note) if words else note == ""


def test_an_evaluation_that_outweighs_its_chunk_is_told(tmp_path: Path) -> None:
    """By hand: a step is three forwards, so 40 batches are 13 steps, and a chunk has 5."""
    config = Config.model_validate(tree_of(tmp_path))
    manifest, order = check_data(config)
    assert evaluation_note(config, held_out_sets(config, manifest), order) == ""

    # The same data with a held-out part as long as eight chunks.
    assert manifest.held_out is not None
    long = manifest.held_out.model_copy(update={"rows": 12 * 40})
    many = held_out_sets(config, manifest.model_copy(update={"held_out": long}))
    note = evaluation_note(config, many, order)
    assert "480 rows cost" in note and "13 steps" in note and "after every 5 steps" in note
    # A tenth of the five steps.
    assert "data.held_out_rows=18 makes that 0.5 steps" in note
    assert "960 rows of 2 sets cost" in evaluation_note(config, many * 2, order)
    rarer = Config.model_validate(tree_of(tmp_path, checkpoint__every_chunks=2))
    assert "after every 10 steps" in evaluation_note(rarer, many, order)
    full = Config.model_validate(tree_of(tmp_path, kernels__recompute="full"))
    assert "10 steps, after every 5" in evaluation_note(full, many, order)


def test_explain_looks_at_the_data(tmp_path: Path) -> None:
    """Catches a plan that is shown as fine, and refused by the start."""
    path = write_yaml(tmp_path / "c.yaml", tree_of(tmp_path))
    done = train("--explain", path)
    assert done.returncode == 0 and "2 chunks, 10 steps" in done.stdout.splitlines()[-1]
    assert train("--explain", path, f"data.manifest={tmp_path / 'data'}").returncode == 0
    for override, words in (
        ("data.order=[0,9]", "data.order names chunk_009"),
        ("lr.warmup_steps=99", "lr.warmup_steps (99)"),
    ):
        done = train("--explain", path, override)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    done = train("--explain", path, "data.manifest=elsewhere")
    assert done.returncode == 0 and "not there" in done.stdout.splitlines()[-1]


def test_bits_that_do_not_repeat_are_told() -> None:
    """Catches a run on a GPU that promises what it does not keep, and a warning on a CPU."""
    exact, loose = (tiny_config(kernels__deterministic=value) for value in (True, False))
    note = determinism_note(loose, "cuda")
    assert note.startswith("kernels.deterministic is false: ") and "resume" in note
    assert [determinism_note(exact, "cuda"), determinism_note(loose, "cpu")] == ["", ""]


def test_a_resume_with_another_determinism_is_told() -> None:
    """Catches a run whose bits repeat up to somewhere, and nobody knows where."""
    exact, loose = (tiny_config(kernels__deterministic=value) for value in (True, False))
    trees = [config.model_dump(mode="json") for config in (exact, loose)]
    assert "was true up to this checkpoint" in determinism_change(trees[0], loose, "cuda")
    assert "was false up to this checkpoint" in determinism_change(trees[1], exact, "cuda")
    for before, now, device in (
        (trees[0], exact, "cuda"),
        (trees[1], loose, "cuda"),
        (trees[0], loose, "cpu"),
        # A checkpoint older than the key.
        ({"kernels": {"attention": "auto"}}, exact, "cuda"),
        ({}, exact, "cuda"),
    ):
        assert determinism_change(before, now, device) == ""
