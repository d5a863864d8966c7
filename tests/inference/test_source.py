"""`inference/source.py`: catches an older checkpoint than the newest, and another tokenizer."""

import shutil
from pathlib import Path

import pytest
import torch

from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import CheckpointError, DataError, RunError
from k2train.inference.session import opened
from k2train.inference.source import Source, find_checkpoint
from k2train.launch.environment import Launch
from tests.support.hugging_face import checkpoint_tensors
from tests.support.tiny_generation import MODEL_VOCAB


def test_a_run_stands_for_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    """Catches the first one, and one that is half saved."""
    newest = run / "checkpoints" / "ckpt_001"
    assert find_checkpoint(run) == newest
    assert find_checkpoint(run / "checkpoints" / "ckpt_000").name == "ckpt_000"
    (run / "checkpoints" / "ckpt_002.tmp").mkdir()
    try:
        assert find_checkpoint(run) == newest
    finally:
        (run / "checkpoints" / "ckpt_002.tmp").rmdir()

    with pytest.raises(RunError, match="neither a checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(RunError, match="not a folder"):
        find_checkpoint(tmp_path / "none")


def test_what_a_checkpoint_says_of_itself(run: Path) -> None:
    """Catches the defaults of a config in place of what was trained."""
    found = Source.find(run)
    a = found.architecture
    assert (a.num_kv_heads, a.rope_theta, a.vocab_size) == (2, 500.0, MODEL_VOCAB)
    assert (found.context_tokens, found.precision) == (16, "fp32")
    assert found.tokenizer.sha256 == found.manifest.data.tokenizer_sha256


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path) -> None:
    """Catches text of other ids than the model learned."""
    other = train_tokenizer(["quite another text " * 4] * 9, 280)
    other.save(tmp_path / "other.model")
    with pytest.raises(DataError, match=r"other.model: is not the tokenizer of .*ckpt_001"):
        Source.find(run, tmp_path / "other.model")


def test_data_that_has_moved(run: Path, tmp_path: Path) -> None:
    """Catches a checkpoint that cannot be used because its chunks are gone."""
    data, away = run.parent.parent / "data", tmp_path / "away"
    shutil.move(data, away)
    try:
        with pytest.raises(DataError, match="--tokenizer FILE"):
            Source.find(run)
        found = Source.find(run, away / "tokenizer.model")
        assert found.tokenizer.sha256 == found.manifest.data.tokenizer_sha256
    finally:
        shutil.move(away, data)


def test_a_run_falls_back_to_what_is_whole(run: Path, tmp_path: Path) -> None:
    """Catches a damaged newest checkpoint that ends a generation, and one passed over in silence,
    or where it was named itself.
    """
    folder = tmp_path / "runs" / "spoken" / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    data = next((run.parent.parent / "data").glob("tokenizer.model"))
    newest, older = folder / "ckpt_001", folder / "ckpt_000"
    file = min((newest / "model").iterdir())
    content = file.read_bytes()

    def said(path: Path) -> tuple[Path, list[str]]:
        told: list[str] = []
        launch = Launch(0, 1, 0, False)
        with opened(Source.find(path, data), launch, 1, 1, False, told.append) as model:
            weights = model.stage.state_dict()
        return older if same(weights, older) else newest, told

    def same(weights: dict[str, torch.Tensor], path: Path) -> bool:
        found = checkpoint_tensors(path)
        return torch.equal(weights["embedding.weight"], torch.from_numpy(found["embedding.weight"]))

    assert said(folder.parent) == (newest, [])
    flipped = bytes([*content[:-3], content[-3] ^ 1, *content[-2:]])
    for damaged, reason in ((flipped, "does not match its hash"), (content[:-2], "bytes")):
        file.write_bytes(damaged)
        taken, told = said(folder.parent)
        assert taken == older and len(told) == 2
        assert told[0].startswith(f"refused: {newest}: model/") and reason in told[0]
        assert told[1] == f"taken: {older}, step 0"
        with pytest.raises(CheckpointError, match=reason):
            said(newest)

    shutil.rmtree(newest / "model")
    assert said(folder.parent)[0] == older
    (newest / "manifest.json").write_text("{")
    assert "not valid JSON" in said(folder.parent)[1][0]
    for path in (older / "model").iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        said(folder.parent)
