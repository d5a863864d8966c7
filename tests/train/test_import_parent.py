"""`run.init_from: hf:FOLDER`: a run that starts from transformers' weights, on several ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.config.load import Config
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import CheckpointError, DataError, RunError
from k2train.hf.tokenizer_files import write_tokenizer
from k2train.train.preflight import prepare_start
from tests.support.hugging_face import checkpoint_tensors, llama, saved, write_tree
from tests.support.tiny_corpus import config_tree, make_corpus, opened, train

pytest.importorskip("transformers")
MODEL = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 61,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_corpus(folder / "data", 1, vocab=61)
    saved(folder / "hf", llama(num_key_value_heads=2), torch.float32)
    return folder


def tree_of(base: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "model": MODEL,
        "run__init_from": f"hf:{base / 'hf'}",
        "run__allow": ["tokenizer"],
        **changes,
    }
    return config_tree(base / "data" / "manifest.json", runs, "r", **given)


def test_a_run_from_a_folder(base: Path, tmp_path: Path) -> None:
    """Catches weights that do not arrive, on another layout than one rank: the first checkpoint
    holds them bit for bit, and the loss of the first step is that of transformers.
    """
    tree = tree_of(base, tmp_path, parallel={"tensor": 2, "pipeline": 1}, run__stop_after_steps=1)
    done = train(write_tree(tmp_path / "c.yaml", tree), processes=2)
    assert done.returncode == 75, done.stderr
    told = "weights alone (it was imported from a Hugging Face folder; moments start from zero)"
    assert told in done.stdout + done.stderr
    directory = tmp_path / "r"
    start = checkpoint_tensors(directory / "checkpoints" / "ckpt_000")
    there = checkpoint_tensors(directory / "imported" / "ckpt_000")
    model = llama(num_key_value_heads=2)
    assert (start["embedding.weight"] == model.model.embed_tokens.weight.detach().numpy()).all()
    assert {k: v.tobytes() for k, v in start.items()} == {k: v.tobytes() for k, v in there.items()}

    ledger = [json.loads(line) for line in (directory / "ledger.jsonl").read_text().splitlines()]
    (seam,) = [entry for entry in ledger if entry["event"] == "seam"]
    assert seam["parent"].endswith("imported/ckpt_000") and seam["moments_kept"] is False
    assert len(seam["parent_manifest_sha256"]) == 64 and seam["same_tokenizer"] is False


def test_mistakes_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    """Catches a model that differs, or a tokenizer that nobody compared, seen late or never."""

    def refused(kind: type[Exception], words: str, **changes: Any) -> None:
        config = Config.model_validate(tree_of(base, tmp_path / "runs", **changes))
        with pytest.raises(kind, match=words) as caught:
            prepare_start(config, 1, verify=False)
        assert "\n" not in str(caught.value)

    refused(
        CheckpointError,
        r"run.init_from \(hf:.*\) holds another model: model.num_kv_heads: 2 -> 4",
        model={**MODEL, "num_kv_heads": 4},
    )
    refused(DataError, r"has no tokenizer to .*run.allow=\[tokenizer\]", run__allow=[])
    shutil.copytree(base / "hf", tmp_path / "hf")
    lines = [f"the number {n}" for n in range(200)]
    write_tokenizer(tmp_path / "hf", train_tokenizer(lines, 290), 32)
    other = f"hf:{tmp_path / 'hf'}"
    refused(
        DataError,
        r"was made with tokenizer tttttttttttt, run.init_from \(hf:.* was trained with",
        run__init_from=other,
    )
    refused(CheckpointError, "is no Hugging Face folder", run__init_from=f"hf:{tmp_path}")
    assert not (tmp_path / "runs").exists()


def test_a_tied_head_is_told(base: Path, tmp_path: Path) -> None:
    """Catches a head that is untied without a word."""
    saved(tmp_path / "hf", llama(num_key_value_heads=2, tie_word_embeddings=True))
    tree = tree_of(base, tmp_path / "runs", run__init_from=f"hf:{tmp_path / 'hf'}")
    start = prepare_start(Config.model_validate(tree), 1, verify=False)
    assert "the head becomes a tensor of its own" in start.warning


def start_job(launch: Any, tree: dict[str, Any]) -> str:
    """What becomes of a start: the error, or the moments that it has."""
    from k2train.train.run import build

    start = prepare_start(Config.model_validate(tree), launch.world_size, verify=False)
    try:
        with opened(launch, start) as run:
            trainer = build(start, run)
            assert trainer is not None, "there are steps to train"
            return str(trainer.start.transition.parent_manifest_sha256)[:8]
    except RunError as error:
        return str(error)


def test_an_import_is_made_once(pool: Any, base: Path, tmp_path: Path) -> None:
    """Catches a second import by a start that found the first, and another folder's import taken
    for this one's.
    """
    folder = tmp_path / "hf"
    shutil.copytree(base / "hf", folder)
    tree = tree_of(base, tmp_path / "runs", run__init_from=f"hf:{folder}")
    # Like a start that was killed before its first checkpoint.
    first = pool.run(1, start_job, tree)
    assert len(first[0]) == 8
    assert pool.run(2, start_job, tree) == [first[0], first[0]]
    saved(folder, llama(seed=5, num_key_value_heads=2, rms_norm_eps=2e-5))
    tree["model"]["norm_eps"] = 2e-5
    said = pool.run(2, start_job, tree)
    assert said[0] == said[1] and "was imported from another folder" in said[0]
