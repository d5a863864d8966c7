"""A tiny run whose data has provenance, a release of it with proofs, and a key of its own."""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from k2train.data.manifest import Manifest
from k2train.proofs.keys import new_key
from k2train.proofs.write import write_proofs
from tests.support import data_folder
from tests.support.tiny_corpus import (
    GLOBAL,
    ROWS,
    SEQUENCE,
    VOCAB,
    config_tree,
    train,
    write_yaml,
)

TOKENIZER = "0123456789abcdef" * 4
SUBSETS = {"letters": 12, "forms": 4}
"""Tokens of each row, of 16."""
WATTS = 10.0
READ, UNREAD = ("chunk_000", "chunk_001"), "chunk_002"
"""Chunks that the run reads, and one that its order leaves out."""


class Made(NamedTuple):
    """A run, its data, a release of it without proofs, and a private key outside of it."""

    run: Path
    data: Manifest
    release: Path
    key: Path


def used_files(data: Manifest) -> list[Path]:
    """The files of the chunks that the run read, and of the held-out one."""
    files = [path for path in data.folder.iterdir() if path.suffix != ".json"]
    return sorted(path for path in files if not path.name.startswith(UNREAD))


def make_data(folder: Path) -> Manifest:
    """Three chunks and a held-out one, with the origin of every token."""
    folder.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(key=5))
    infos = []
    names = (*READ, UNREAD)
    for name, rows in (*((name, ROWS) for name in names), ("held_out", 2 * GLOBAL)):
        pieces = {
            "row": np.repeat(np.arange(rows), 2),
            "start": [0, SUBSETS["letters"]] * rows,
            "length": [*SUBSETS.values()] * rows,
            "subset": [*SUBSETS] * rows,
            "source": ["letters.txt", "forms.txt"] * rows,
            "document": [f"{name}-{number}" for number in range(2 * rows)],
            "offset": [0] * (2 * rows),
            "fim": [None] * (2 * rows),
            "repeat": [0] * (2 * rows),
        }
        ids = rng.integers(0, VOCAB, (rows, SEQUENCE))
        subsets = {subset: rows * tokens for subset, tokens in SUBSETS.items()}
        infos.append(data_folder.add_chunk(folder, name, ids, VOCAB, subsets, pieces=pieces))
    account = {"letters": {"documents_read": 130, "duplicate_documents": 4}}
    recipe = {"subsets": {"letters": {"kind": "text", "origin": "https://letters.example"}}}
    facts = {"account": account, "recipe": recipe}
    return data_folder.finish(folder, infos, SEQUENCE, VOCAB, TOKENIZER, facts)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two chunks trained, one checkpoint after each, and all of it copied to a release."""
    base = tmp_path_factory.mktemp("proofs")
    data = make_data(base / "data")
    tree = config_tree(
        data.path,
        base / "runs",
        "tiny",
        energy={"device_watts": WATTS, "tonnes_per_mwh": 0.4},
        wandb__entity="someone",
        data__order=[0, 1],
    )
    done = train(write_yaml(base / "tiny.yaml", tree))
    assert done.returncode == 0, done.stderr

    run, release = base / "runs" / "tiny", base / "release"
    for checkpoint in ("ckpt_001", "ckpt_002"):
        shutil.copytree(run / "checkpoints" / checkpoint, release / checkpoint)
    for name in ("ledger.jsonl", "metrics.jsonl"):
        shutil.copy(run / name, release / name)
    shutil.copytree(data.folder, release / "data")
    new_key(base / "private.pem")
    return Made(run, data, release, base / "private.pem")


@pytest.fixture(scope="session")
def signed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with signed proofs, which tests only read."""
    folder = tmp_path_factory.mktemp("signed") / "release"
    shutil.copytree(made.release, folder)
    write_proofs(folder, [made.run], made.key)
    return folder


@pytest.fixture
def own(signed: Path, tmp_path: Path) -> Path:
    """A copy of the signed release, which a test may change."""
    return Path(shutil.copytree(signed, tmp_path / "release"))
