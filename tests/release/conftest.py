"""Two tiny runs to release: one with relative paths, and evaluated; one with absolute ones."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from k2train.evaluation.results import FORMAT, Item, TaskResult, write_result
from k2train.files import sha256_file
from tests.support import forkserver
from tests.support.data_folder import add_chunk, finish
from tests.support.hugging_face import write_tree
from tests.support.tiny_corpus import TRAIN, config_tree, environment
from tests.support.tiny_generation import MODEL_VOCAB, tiny_tokenizer

LENGTH, ROWS, CHUNKS = 16, 24, 3
"""Two steps a chunk."""


def make_data(folder: Path) -> None:
    """A data folder with provenance and a tokenizer."""
    folder.mkdir()
    tokenizer = tiny_tokenizer()
    rng = np.random.Generator(np.random.Philox(key=4))
    pieces = {
        "row": range(ROWS),
        "start": [0] * ROWS,
        "length": [LENGTH] * ROWS,
        "subset": ["notes"] * ROWS,
        "source": ["notes.txt"] * ROWS,
        "fim": [None] * ROWS,
        "document": [f"d{n}" for n in range(ROWS)],
        "offset": [0] * ROWS,
        "repeat": [0] * ROWS,
    }
    infos = [
        add_chunk(
            folder,
            name,
            rng.integers(0, tokenizer.vocab_size, (ROWS, LENGTH)),
            tokenizer.vocab_size,
            {"notes": ROWS * LENGTH},
            pieces=pieces,
        )
        for name in (*(f"chunk_{n:03d}" for n in range(CHUNKS)), "held_out")
    ]
    tokenizer.save(folder / "tokenizer.model")
    finish(folder, infos, LENGTH, tokenizer.vocab_size, tokenizer.sha256)


def trained(base: Path, name: str, manifest: Path, directory: Path, precision: str) -> Path:
    """Train with `base` as the working directory."""
    tree = config_tree(
        manifest,
        directory,
        name,
        model__vocab_size=MODEL_VOCAB,
        precision=precision,
        audit__root_every_steps=2,
        checkpoint__keep_optimizer_states=2,
        checkpoint__every_seconds=0,
    )
    config = write_tree(base / f"{name}.yaml", tree)
    done = forkserver.run([*TRAIN, config], environment(), base)
    assert done.returncode == 0, done.stderr
    return base / "runs" / name


def evaluate(run: Path, checkpoint: str, step: int) -> None:
    """A result as an evaluation writes it."""
    item = Item(
        item="q1",
        prompt_sha256=sha256(b"two?").hexdigest(),
        prompt="two?",
        target="2",
        choices=("1", "2"),
        log_likelihoods=(-2.0, -1.5),
        scores={"acc": 1.0},
    )
    result = TaskResult(
        format=FORMAT,
        task="toy",
        version="1",
        style="default",
        checkpoint=checkpoint,
        step=step,
        manifest_sha256=sha256_file(run / "checkpoints" / checkpoint / "manifest.json"),
        harness="by hand",
        items=1,
        items_sha256="0",
        scores={"acc": 0.875},
    )
    write_result(run, result, [item])


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What holds the data and the runs."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("release")
    make_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def plain(base: Path) -> Path:
    """A run in fp32 whose record names no path of this machine."""
    run = trained(base, "plain", Path("data/manifest.json"), Path("runs"), "fp32")
    evaluate(run, "ckpt_002", 4)
    (run / "evaluation" / "contamination.json").write_text('{"tasks": ["toy"]}\n', encoding="utf-8")
    (run / "gallery" / "pages").mkdir(parents=True)
    (run / "gallery" / "pages" / "index.html").write_text("<!doctype html>\n", encoding="utf-8")
    return run


@pytest.fixture(scope="session")
def private(base: Path) -> Path:
    """A run in bf16 with absolute paths."""
    return trained(base, "private", base / "data" / "manifest.json", base / "runs", "bf16")
