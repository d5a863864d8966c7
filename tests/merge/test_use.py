"""Uses of a merged checkpoint: a run that starts from it, an export, what it has read."""

from pathlib import Path

import numpy as np
import pytest

from k2train.checkpoint.manifest import read_manifest
from k2train.files import sha256_file
from k2train.hf.checkpoint_source import CheckpointSource
from k2train.hf.export import ExportOptions, export
from k2train.hf.names import transformers_name
from k2train.merge.program import merge_checkpoints
from k2train.merge.weights import Weights
from k2train.record.events import StageTransition, of_kind
from k2train.record.ledger import read_ledger
from tests.merge.conftest import tree_of
from tests.support.gloo_pool import GlooPool
from tests.support.hugging_face import checkpoint_tensors, tensors_of
from tests.support.tiny_corpus import make_corpus, trainer_job

MEAN = Weights("mean")


@pytest.fixture(scope="module")
def merged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = base / "runs" / "r"
    paths = [run / "checkpoints" / f"ckpt_00{number}" for number in (2, 3, 4)]
    path = tmp_path_factory.mktemp("merged") / "window"
    return merge_checkpoints(run, paths, MEAN, path).path


def test_a_run_starts_from_it(pool: GlooPool, base: Path, merged: Path, tmp_path: Path) -> None:
    """Catches master weights that were rounded on the way, on two ranks, and moments made up."""
    make_corpus(tmp_path / "data", seed=7)
    tree = tree_of(tmp_path, "next", parallel__tensor=2, run__stop_after_steps=1)
    tree["run"]["init_from"] = str(merged)
    assert pool.run(2, trainer_job, tree) == [75, 75]

    begin = tmp_path / "runs" / "next" / "checkpoints" / "ckpt_000"
    before, after = (checkpoint_tensors(path, "optimizer") for path in (merged, begin))
    assert len(after) == 3 * len(before) > 30
    for name, values in after.items():
        expected = before[name] if name.endswith(".master") else np.zeros_like(values)
        assert values.tobytes() == expected.tobytes(), name
    assert read_manifest(begin).adam_steps == 0

    (event,) = of_kind(read_ledger(begin.parents[1] / "ledger.jsonl"), StageTransition)
    assert (event.moments_kept, event.parent_step) == (False, 20)
    assert event.parent_manifest_sha256 == sha256_file(merged / "manifest.json")


def test_its_data_were_seen(pool: GlooPool, base: Path, merged: Path, tmp_path: Path) -> None:
    """Catches a stage that trains again on what any of the merged checkpoints has read."""
    tree = tree_of(base, "again", run__stop_after_steps=1)
    tree["run"]["init_from"] = str(merged)
    (told,) = pool.run(1, trainer_job, tree)
    assert "shares data with what was trained on before: chunk_000 is chunk_000" in str(told)

    # A newest one that has read less than another: every chunk counts.
    run = base / "runs" / "r"
    paths = [run / "checkpoints" / "ckpt_003", base / "runs" / "tp2" / "checkpoints" / "ckpt_000"]
    done = merge_checkpoints(run, paths, MEAN, tmp_path / "out")
    begun = [chunk.name for chunk in read_manifest(done.path).chunks.begun()]
    assert begun == ["chunk_000", "chunk_001", "chunk_002"]


def test_an_export_has_its_weights(merged: Path, tmp_path: Path) -> None:
    """Catches an export of a parent, and logits that are not those of transformers."""
    pytest.importorskip("transformers")
    export(CheckpointSource(merged), tmp_path / "bf16", None, ExportOptions())
    export(CheckpointSource(merged, "fp32"), tmp_path / "fp32", None, ExportOptions(check=False))
    for folder, suffix, out in (("model", "", "bf16"), ("optimizer", ".master", "fp32")):
        mine, theirs = checkpoint_tensors(merged, folder), tensors_of(tmp_path / out)
        assert len(mine) == len(theirs) > 10
        for name, values in mine.items():
            found = theirs[transformers_name(name.removesuffix(suffix))].float().numpy()
            assert found.tobytes() == values.tobytes(), name
