"""A run of four chunks in bf16, and the same last state saved in three other layouts."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, trainer_job

LAYOUTS = {
    "tp2": {"parallel__tensor": 2},
    "pp2": {"parallel__pipeline": 2},
    "dp2": {},
}
"""Ways to cut the state over two processes."""


@pytest.fixture(scope="session")
def first(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run `runs/r`, which is all that most tests need."""
    folder = tmp_path_factory.mktemp("merge")
    make_corpus(folder / "data")
    assert pool.run(1, trainer_job, tree_of(folder, "r")) == [0]
    return folder


@pytest.fixture(scope="session")
def base(pool: GlooPool, first: Path) -> Path:
    """The same folder with `runs/tp2` and so on, whose ckpt_000 is the run's ckpt_004."""
    folder = first
    for name, layout in LAYOUTS.items():
        more = {"data__seen_before": "allow", "run__stop_after_steps": 1, **layout}
        tree = tree_of(folder, name, **more)
        tree["run"]["init_from"] = str(folder / "runs" / "r" / "checkpoints" / "ckpt_004")
        assert pool.run(2, trainer_job, tree) == [75, 75]
    return folder


@pytest.fixture
def run(first: Path) -> Path:
    return first / "runs" / "r"


def tree_of(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Config of a run over the corpus of `folder`."""
    changes = {"precision": "bf16", "checkpoint__keep_optimizer_states": 0, **changes}
    return config_tree(folder / "data" / "manifest.json", folder / "runs", name, **changes)
