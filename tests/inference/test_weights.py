"""`inference/weights.py`: catches damaged or missing weights that are used, and the wrong copy."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k2train.checkpoint.manifest import mark_thinned
from k2train.errors import CheckpointError
from k2train.inference.model import LanguageModel
from k2train.inference.source import Source
from k2train.parallel.shard import named_slices


def copy_of(source: Source, folder: Path) -> Source:
    """The checkpoint copied, so that a test may damage it."""
    path = folder / source.path.name
    shutil.copytree(source.path, path)
    return replace(source, path=path)


def test_one_changed_byte_is_refused(source: Source, tmp_path: Path) -> None:
    """Catches weights that are not those that were saved: text would still come out."""
    damaged = copy_of(source, tmp_path)
    file = sorted((damaged.path / "model").iterdir())[1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        LanguageModel(damaged)


@pytest.mark.parametrize("what", ("gone", "short"))
def test_a_file_that_is_not_whole(source: Source, tmp_path: Path, what: str) -> None:
    """Catches a traceback, and zeros in place of what is missing."""
    damaged = copy_of(source, tmp_path)
    file = sorted((damaged.path / "model").iterdir())[0]
    if what == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=str(damaged.path)):
        LanguageModel(damaged)


def test_a_model_of_another_shape(source: Source) -> None:
    """Catches rows that are left as zeros because the config says so."""
    other = replace(source, architecture=replace(source.architecture, ffn_hidden_size=64))
    with pytest.raises(CheckpointError, match=r"mlp.gate.weight has shape \[48, 32\].*\[64, 32\]"):
        LanguageModel(other)


def test_master_weights(source: Source, tmp_path: Path) -> None:
    """Catches `--fp32` that reads the other copy, and one that finds none and says nothing.

    In an fp32 run both are the same bits; only the thinned copy tells them apart.
    """
    both = [LanguageModel(source, fp32=wide) for wide in (False, True)]
    pairs = zip(*(named_slices(model.stage) for model in both), strict=True)
    for (one, part), (other, _) in pairs:
        assert torch.equal(part.of(one), part.of(other)) and part.of(one).abs().max() > 0

    thinned = copy_of(source, tmp_path)
    mark_thinned(thinned.path, thinned.manifest)
    shutil.rmtree(thinned.path / "optimizer")
    LanguageModel(thinned)
    with pytest.raises(CheckpointError, match="leave out --fp32"):
        LanguageModel(thinned, fp32=True)
