"""A run on four ranks, tensor 2 and pipeline 2, and a tokenizer trained on a few lines."""

from pathlib import Path

import pytest

from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from tests.support.hugging_face import LLAMA3, write_tree
from tests.support.tiny_corpus import config_tree, make_corpus, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run in bf16 with grouped heads and stretched positions, five steps."""
    pytest.importorskip("transformers")
    base = tmp_path_factory.mktemp("trained")
    make_corpus(base / "data", 2, tokenizer="ab" * 32)
    tree = config_tree(
        base / "data" / "manifest.json",
        base / "runs",
        "r",
        parallel={"tensor": 2, "pipeline": 2},
        data__order=[0],
        model__num_kv_heads=2,
        model__vocab_size=361,
        model__rope_theta=500.0,
        model__rope_scaling={"type": "llama3", **LLAMA3},
        model__norm_eps=1e-3,
        precision="bf16",
    )
    done = train(write_tree(base / "config.yaml", tree), processes=4)
    assert done.returncode == 0, done.stderr
    return base / "runs" / "r"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A sentencepiece BPE with byte fallback."""
    lines = [f"the number {n} and the word na\u00efve are   spelt {n * 7}aaa" for n in range(400)]
    return train_tokenizer(lines, 340)
