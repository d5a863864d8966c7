"""Changes allowed by name at a resume.

Would catch a change that silently moves the data position, a name that allows more than it says,
and a refusal that does not say what to write.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from k2train.checkpoint.manifest import MANIFEST, checkpoint_name, seal
from k2train.config.load import Config
from k2train.errors import CheckpointError
from k2train.files import write_synced
from k2train.record.events import Resumed, of_kind
from k2train.record.ledger import read_ledger
from k2train.train.preflight import check_data
from k2train.train.resume_check import check_same_run, identity_differences, identity_of
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, trainer_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("identity")
    make_corpus(made / "data", 4)
    return made


def identity(folder: Path, **changes: Any) -> dict[str, Any]:
    config = Config.model_validate(
        config_tree(folder / "data" / "manifest.json", folder / "runs", "r", **changes)
    )
    return identity_of(config, *check_data(config))


def saved(folder: Path, tmp_path: Path, consumed: int, step_in_chunk: int = 0) -> Path:
    """A checkpoint that is nothing but its manifest."""
    path = tmp_path / checkpoint_name(consumed)
    path.mkdir(parents=True)
    facts = {
        "format": 1,
        "name": path.name,
        "step": 5 * consumed + step_in_chunk,
        "adam_steps": 1,
        "consumed_tokens": 1,
        "chunks": {"consumed": consumed, "step_in_chunk": step_in_chunk},
        "config": {},
        "data": {},
        "tensors": {},
        "files": {},
        "identity": identity(folder),
    }
    write_synced(path / MANIFEST, json.dumps(seal(facts)))
    return path


@pytest.mark.parametrize(
    ("change", "allow", "key"),
    (
        ({"lr__peak": 0.02}, ("lr.peak",), "lr.peak"),
        ({"lr__peak": 0.02, "lr__final": 0.002}, ("lr",), "lr.final"),
        ({"optimizer__weight_decay": 0.2}, ("optimizer.weight_decay",), "optimizer.weight_decay"),
        ({"data__order": [0, 1, 3, 2]}, ("data.order",), "data.order"),
    ),
)
def test_what_is_named_may_change(
    folder: Path, tmp_path: Path, change: dict[str, Any], allow: Any, key: str
) -> None:
    """And without the name it is refused, with the name to write.

    A name of another key opens nothing.
    """
    path, now = saved(folder, tmp_path, 2), identity(folder, **change)
    allowed = check_same_run(path, now, allow)
    assert allowed == identity_differences(identity(folder), now) and allowed
    for names in ((), ("optimizer.eps",), ("lr.peak_", "l")):
        with pytest.raises(CheckpointError, match=r"run\.allow=\[.*" + key) as refused:
            check_same_run(path, now, names)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    (
        {"batch__global_sequences": 6},
        {"model__norm_eps": 1e-6},
        {"data__order": [1, 0, 2, 3]},
        {"data__order": [0, 1, 3]},
    ),
)
def test_what_moves_the_position_can_never_be_allowed(
    folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """The step says where a run stands in the data.

    The third chunk is begun, so it cannot be another one.
    """
    path, now = saved(folder, tmp_path, 2, step_in_chunk=3), identity(folder, **change)
    everything = ("batch", "model", "data", "data.order", "lr", "run")
    with pytest.raises(CheckpointError) as refused:
        check_same_run(path, now, everything)
    assert "run.allow" not in str(refused.value) and "change the config back" in str(refused.value)


def test_the_order_of_sums_belongs_to_an_exact_run(folder: Path, tmp_path: Path) -> None:
    """Catches a run that goes on with other bits unnoticed; a run that is not exact has no key."""
    assert "exact" not in identity(folder)["run"]
    exact = identity(folder, run__exact=True)
    assert exact["run"]["exact"] == {"unit": 1, "leaf": 1}
    path = saved(folder, tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"run\.exact\.unit: absent -> 1"):
        check_same_run(path, exact, ())
    assert check_same_run(path, exact, ("run.exact",))
    changed = identity(folder, run__exact=True, batch__exact_leaf=2)
    assert identity_differences(exact, changed) == ["run.exact.leaf: 1 -> 2"]


def test_nothing_changed_needs_no_name(folder: Path, tmp_path: Path) -> None:
    assert check_same_run(saved(folder, tmp_path, 1), identity(folder), ()) == []


def test_an_allowed_change_is_kept_in_the_ledger(folder: Path, pool: GlooPool) -> None:
    """And from the next checkpoint on it is the run's own: no name is needed any more."""
    tree = config_tree(
        folder / "data" / "manifest.json", folder / "runs", "allowed", run__stop_after_steps=5
    )
    assert pool.run(1, trainer_job, tree) == [75]
    tree["lr"]["peak"] = 0.02
    assert "run.allow=[lr.peak]" in pool.run(1, trainer_job, tree)[0]
    tree["run"]["allow"] = ["lr.peak"]
    assert pool.run(1, trainer_job, tree) == [75]
    resumed = of_kind(read_ledger(folder / "runs" / "allowed" / "ledger.jsonl"), Resumed)
    assert resumed[-1].allowed == ("lr.peak: 0.01 -> 0.02",)
    tree["run"]["allow"] = []
    assert pool.run(1, trainer_job, tree) == [75]
