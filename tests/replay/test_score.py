"""`replay/score.py` and `tools/score.py`: catches another loss than the run's, and other rows."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from k2train.checkpoint.manifest import mark_thinned, read_manifest
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.errors import DataError, UserError
from k2train.hf.checkpoint_source import CheckpointSource
from k2train.hf.export import ExportOptions, export
from k2train.launch.environment import Launch
from k2train.replay.score import begin_score, score_on
from tests.support import forkserver
from tests.support.gloo_pool import GlooPool
from tests.support.masked_data import GLOBAL as MASKED_GLOBAL
from tests.support.masked_data import masked_folder
from tests.support.tiny_corpus import (
    GLOBAL,
    ROOT,
    config_tree,
    environment,
    make_corpus,
    trainer_job,
)
from tests.support.tiny_model import grid_of


@pytest.fixture(scope="module")
def run(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one chunk on two ranks, whose sets are its own held-out chunk and another folder."""
    base = tmp_path_factory.mktemp("score")
    make_corpus(base / "data", 1)
    make_corpus(base / "other", 1, seed=5, held_out=False)
    tree = config_tree(
        base / "data" / "manifest.json",
        base / "runs",
        "r",
        parallel__tensor=2,
        data__held_out_sets={"other": str(base / "other" / "manifest.json")},
    )
    assert pool.run(2, trainer_job, tree) == [0, 0]
    return base / "runs" / "r"


def score_job(launch: Launch, path: Path, data: Path | None) -> list[tuple[str, float, int]]:
    start = begin_score(path, read_manifest(path), data)
    found = score_on(grid_of(launch, start.setup.config), path, start)
    return [(part.name, part.loss, part.rows) for part in found]


def test_it_is_the_loss_that_the_run_recorded(pool: GlooPool, run: Path, tmp_path: Path) -> None:
    """Catches other weights, rows or precision; whole and thinned, to rounding of two layouts."""
    path = run / "checkpoints" / "ckpt_001"
    (found,) = pool.run(1, score_job, path, None)
    recorded = [(part.name, part.rows) for part in read_manifest(path).held_out or ()]
    assert [(name, rows) for name, _, rows in found] == recorded
    for (_, loss, _), part in zip(found, read_manifest(path).held_out or (), strict=True):
        assert loss == pytest.approx(part.loss, abs=1e-6)

    thinned = tmp_path / "ckpt_001"
    shutil.copytree(path, thinned)
    mark_thinned(thinned, read_manifest(thinned))
    shutil.rmtree(thinned / "optimizer")
    assert pool.run(1, score_job, thinned, None) == [found]


def test_it_is_the_loss_of_transformers(pool: GlooPool, run: Path, tmp_path: Path) -> None:
    """Catches a mean over other targets: the loss of the exported model over the same rows, also
    of another folder that holds nothing out.
    """
    transformers = pytest.importorskip("transformers")
    path = run / "checkpoints" / "ckpt_001"
    export(CheckpointSource(path), tmp_path / "hf", None, ExportOptions(check=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()

    def theirs(folder: Path, name: str) -> float:
        manifest = read_data_manifest(folder / "manifest.json")
        info = next(i for i in manifest.all_chunks() if i.name == name)
        import numpy as np

        rows = torch.from_numpy(np.load(folder / info.file).astype(np.int64))
        with torch.no_grad():
            return float(model(input_ids=rows, labels=rows).loss)

    data, other = run.parent.parent / "data", run.parent.parent / "other"
    (own,) = pool.run(1, score_job, path, None)
    assert own[0][2] == 2 * GLOBAL
    assert own[0][1] == pytest.approx(theirs(data, "held_out"), abs=2e-5)
    (given,) = pool.run(1, score_job, path, other / "manifest.json")
    assert given == [("other", pytest.approx(theirs(other, "chunk_000"), abs=2e-5), 63)]


@pytest.mark.parametrize("value", ("use", "ignore"))
def test_masks_count_as_the_run_has_them(pool: GlooPool, tmp_path: Path, value: str) -> None:
    """Catches a score by masks that the run ignores: another loss than the one it recorded."""
    masked_folder(tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.json"
    tree = config_tree(
        manifest,
        tmp_path / "runs",
        value,
        data__loss_mask=value,
        data__held_out_sets={"again": str(manifest)},
        batch={"global_sequences": MASKED_GLOBAL, "micro_sequences": 2},
        run__stop_after_steps=1,
    )
    assert pool.run(1, trainer_job, tree) == [75]
    path = tmp_path / "runs" / value / "checkpoints" / "ckpt_000"
    recorded = [(part.name, part.loss, part.rows) for part in read_manifest(path).held_out or ()]
    assert len(recorded) == 2
    (found,) = pool.run(1, score_job, path, None)
    assert found == [(name, pytest.approx(loss, abs=1e-6), rows) for name, loss, rows in recorded]
    # The same folder, named by hand.
    (found,) = pool.run(1, score_job, path, manifest)
    assert found == [("held_out", pytest.approx(recorded[0][1], abs=1e-6), recorded[0][2])]


def test_the_command(run: Path) -> None:
    """Catches a line without the set, and JSON that says something else."""
    path = run / "checkpoints" / "ckpt_000"
    done = forkserver.run(["tools/score.py", path, "--json"], environment(), ROOT)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows] == ["held_out", "other"]
    assert rows[0]["loss"] == pytest.approx(read_manifest(path).held_out_loss, abs=1e-6)
    done = forkserver.run(["tools/score.py", run], environment(), ROOT)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "is no checkpoint" in done.stderr


def test_mistakes(run: Path, tmp_path: Path) -> None:
    """Catches a loss over ids of another tokenizer, and a run that has nothing to score."""
    path = run / "checkpoints" / "ckpt_001"
    make_corpus(tmp_path / "t", 1, tokenizer="u" * 64)
    with pytest.raises(DataError, match="was made with tokenizer uuuu"):
        begin_score(path, read_manifest(path), tmp_path / "t" / "manifest.json")
    with pytest.raises(UserError, match="manifest"):
        begin_score(path, read_manifest(path), tmp_path / "none.json")
    manifest = read_manifest(path)
    bare = manifest.model_copy(update={"config": {"model": manifest.config["model"]}})
    with pytest.raises(UserError, match="has no whole config"):
        begin_score(path, bare)
