"""`precision: auto`: decided once, by all ranks alike, recorded, and kept by a resume."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from k2train.checkpoint.manifest import list_checkpoints, read_manifest
from k2train.config.load import Config, load_config
from k2train.launch.environment import Launch
from k2train.record.events import Started
from k2train.record.ledger import read_ledger
from k2train.train import precision
from k2train.train.precision import decide_precision, device_has_bf16
from k2train.train.preflight import prepare_start
from k2train.train.recorded_choices import with_recorded_precision
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, environment, make_corpus, train, write_yaml
from tests.support.tiny_model import grid_of

CPU = torch.device("cpu")


def tree_of(base: Path, **changes: Any) -> dict[str, Any]:
    if not (base / "data").exists():
        make_corpus(base / "data", 1)
    manifest = base / "data" / "manifest.json"
    tree = config_tree(manifest, base / "runs", "a", precision="auto", **changes)
    tree["batch"]["micro_sequences"] = 3
    return tree


def decided(launch: Launch, tree: dict[str, Any], having: list[int]) -> tuple[str, str, str]:
    """Precision of config and identity, and the reason, where these ranks' devices have bf16."""
    config = Config.model_validate(tree)
    start = prepare_start(config, launch.world_size, verify=False)
    with mock.patch.object(precision, "cpu_has_bf16", lambda: launch.rank in having):
        found = decide_precision(start, grid_of(launch, config))
    return found.setup.config.precision, found.identity["precision"], found.precision_reason


@pytest.mark.parametrize(
    ("having", "expected", "words"),
    (
        ([0, 1], "bf16", "all devices have it"),
        ([], "fp32", "no device has"),
        ([1], "fp32", "1 of 2 devices"),
    ),
)
def test_all_ranks_decide_alike(
    pool: GlooPool, tmp_path: Path, having: list[int], expected: str, words: str
) -> None:
    """Catches ranks of two precisions in one run."""
    results = pool.run(2, decided, tree_of(tmp_path), having)
    assert all(result[:2] == (expected, expected) and words in result[2] for result in results)
    assert results[0] == results[1]


@pytest.mark.parametrize(("capability", "expected"), (((7, 5), False), ((8, 0), True)))
def test_a_gpu_by_its_capability(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches bf16 on a GPU that emulates it: torch says that those support it, too."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device_has_bf16(torch.device("cuda", 0)) == expected


def test_an_unknown_cpu_is_taken_for_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: None)
    assert not device_has_bf16(CPU)


def test_a_run_keeps_what_it_began_with(tmp_path: Path) -> None:
    """Catches a resume that changes the numbers, because another machine decides otherwise."""
    path = write_yaml(tmp_path / "c.yaml", tree_of(tmp_path))
    first = train(path, "run.stop_after_steps=1", "precision=bf16")
    assert first.returncode == 75, first.stderr
    run = tmp_path / "runs" / "a"

    # Begun in bf16, gone on with by `auto`, wherever that is.
    kept, reason = with_recorded_precision(load_config(str(path)))
    assert kept.precision == "bf16" and reason == "as in ckpt_000_step_000001"
    second = train(path, "run.stop_after_steps=1")
    assert second.returncode == 75, second.stderr
    assert "precision auto is bf16: as in ckpt_000_step_000001; the run keeps it" in second.stderr
    newest = read_manifest(list_checkpoints(run / "checkpoints")[-1])
    assert newest.step == 2 and newest.identity is not None
    assert newest.identity.precision == newest.config["precision"] == "bf16"

    # Another precision is said and refused, as ever.
    other = train(path, "precision=fp32")
    assert other.returncode == 2 and "precision: bf16 -> fp32" in other.stderr


def test_what_a_first_start_decides_is_recorded(tmp_path: Path) -> None:
    """Catches `auto` in the record: nobody could tell what was computed."""
    path = write_yaml(tmp_path / "c.yaml", tree_of(tmp_path))
    done = train(path, "run.stop_after_steps=1", **environment())
    assert done.returncode == 75, done.stderr
    assert "precision auto is " in done.stderr
    run = tmp_path / "runs" / "a"
    expected = "bf16" if device_has_bf16(CPU) else "fp32"
    (started,) = (
        entry.event
        for entry in read_ledger(run / "ledger.jsonl")
        if isinstance(entry.event, Started)
    )
    assert started.precision == expected
    assert load_config(str(run / "config.yaml")).precision == expected
    newest = read_manifest(list_checkpoints(run / "checkpoints")[-1])
    assert newest.identity is not None and newest.identity.precision == expected
