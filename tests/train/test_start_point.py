"""Start point: manifests with a right hash over content that makes no sense.

Would catch a start that ends in a traceback, which launchers repeat for ever, and one that believes
such a manifest: another step, "finished", another position in the data.
"""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from k2train.checkpoint.manifest import MANIFEST, seal
from k2train.config.load import Config
from k2train.errors import CheckpointError, RunError
from k2train.state_digest import state_root
from k2train.train import __main__ as train_command
from k2train.train.preflight import Start, prepare_start
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import (
    GLOBAL,
    SEQUENCE,
    config_tree,
    make_corpus,
    manifest_of,
    train,
    trainer_job,
    write_yaml,
)


class Gone:
    """A key that is left out."""

    def __repr__(self) -> str:
        return "gone"


GONE = Gone()
Manifest = dict[str, Any]
SPIKE = {
    "onset": 3,
    "center": {"loss": 1.0, "loss_sd": 0.1, "log_grad": 0.0, "log_grad_sd": 0.1},
    "losses": [9.0],
    "log_grads": [0.5],
    "count": 1,
    "quiet": 0,
    "peak_loss": 9.0,
    "peak_log_grad": 0.5,
}
STAGE = {"parent": "runs/a/checkpoints/ckpt_004", "moments_kept": True, "parent_adam_steps": 40}


@pytest.fixture(scope="module")
def stopped(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a run with two checkpoints and half of its way before it."""
    base = tmp_path_factory.mktemp("start_point")
    make_corpus(base / "data", chunks=2, held_out=False)
    assert pool.run(1, trainer_job, tree_in(base, run__stop_after_steps=5)) == [75]
    return base


def tree_in(base: Path, data: Path | None = None, **changes: Any) -> dict[str, Any]:
    tree = config_tree((data or base / "data") / "manifest.json", base / "runs", "run")
    tree["wandb"] = {"mode": "disabled"}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return tree


@pytest.fixture
def base(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that run; the data are read where they are."""
    shutil.copytree(stopped / "runs", tmp_path / "runs")
    return tmp_path


def newest(base: Path) -> Path:
    return base / "runs" / "run" / "checkpoints" / "ckpt_001"


def reseal(checkpoint: Path, change: Callable[[Manifest], object]) -> None:
    """Change a manifest as somebody would who knows all of its hashes."""
    content = manifest_of(checkpoint)
    state = deepcopy(content.get("state"))
    sealed = type(state) is dict and state["root"] == root_of(content)
    change(content)
    if sealed and content.get("state") == state and all(map(is_count, steps_of(content))):
        content["state"] = {**state, "root": root_of(content)}
    (checkpoint / MANIFEST).write_text(json.dumps(seal(content)))


def steps_of(content: Manifest) -> tuple[Any, Any]:
    return content.get("step"), content.get("adam_steps")


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def root_of(content: Manifest) -> str:
    return state_root(content["state"]["digests"], *steps_of(content))


def put(place: str, value: Any) -> Callable[[Manifest], None]:
    """Set the value at a dotted place, or remove it."""
    *above, last = place.split(".")

    def change(content: Manifest) -> None:
        inner = reduce(lambda tree, key: tree[key], above, content)
        if value is GONE:
            del inner[last]
        else:
            inner[last] = value

    return change


def start(base: Path, stopped: Path, **changes: Any) -> Start:
    tree = tree_in(base, stopped / "data", **changes)
    return prepare_start(Config.model_validate(tree), 1, verify=False)


MUTATIONS: tuple[tuple[str, Any, str], ...] = (
    ("step", 2**40, "step (1099511627776) is beyond the last one of the stage (10)"),
    ("step", 6, "chunks.consumed and step_in_chunk are 1 and 0, step 6 is at 1 and 1"),
    ("step", -1, "key 'step' must be a whole number from 0, is -1"),
    ("step", 5.0, "key 'step' must be a whole number from 0, is 5.0"),
    ("step", GONE, "key 'step' is missing"),
    ("adam_steps", 6, "adam_steps (6) is more than step (5)"),
    ("adam_steps", "5", "key 'adam_steps' must be a whole number from 0, is '5'"),
    ("consumed_tokens", 7, f"consumed_tokens (7) is not step (5) times the {GLOBAL * SEQUENCE}"),
    ("chunks", {}, "chunks: key 'consumed' is missing"),
    ("chunks.consumed", 2**40, "are 1099511627776 and 0, step 5 is at 1 and 0"),
    ("chunks.step_in_chunk", 1, "are 1 and 1, step 5 is at 1 and 0"),
    ("chunks.step_in_chunk", None, "chunks: key 'step_in_chunk' must be a whole number from 0"),
    ("chunks.order", "chunk_000", "chunks: key 'order' must be a list"),
    ("attempt", -1, "key 'attempt' must be a whole number from 0, is -1"),
    ("attempt", True, "key 'attempt' must be a whole number from 0, is True"),
    ("fencing_token", "one", "key 'fencing_token' must be a whole number from 0"),
    ("loss", [], "key 'loss' must be a number, is []"),
    ("loss", "high", "key 'loss' must be a number, is 'high'"),
    ("held_out_loss", {}, "key 'held_out_loss' must be a number, is {}"),
    ("lr", -0.1, "key 'lr' must be a number from 0, is -0.1"),
    ("lr", "nan", "key 'lr' must be a number from 0, is 'nan'"),
    ("guard", None, "key 'guard' must be an object, is None"),
    ("guard", GONE, "key 'guard' must be an object, is None"),
    ("guard", [], "key 'guard' must be an object, is []"),
    ("guard.finite", {}, "guard.finite.in_a_row is missing"),
    ("guard.finite.in_a_row", -1, "key 'in_a_row' must be a whole number from 0, is -1"),
    ("guard.finite.in_a_row", 1, "guard.finite counts 1 steps in a row and 0 in all, of 5"),
    ("guard.finite.total", 6, "guard.finite counts 0 steps in a row and 6 in all, of 5"),
    ("guard.spikes", [], "guard: key 'spikes' must be an object, is []"),
    ("guard.spikes.losses", [1.0], "a window of 256 steps has 1 losses and 5 norms"),
    ("guard.spikes.losses", ["x"] * 5, "must be a number, is 'x'"),
    ("guard.spikes.log_grads", [1e6] * 5, "must be the logarithm of a number, is 1000000.0"),
    ("guard.spikes.open", {}, "key 'onset' is missing"),
    ("guard.spikes.open", {**SPIKE, "onset": 9}, "open.onset (9) is after step 5"),
    ("guard.spikes.open", {**SPIKE, "count": 0}, "key 'count' must be a whole number above 0"),
    ("guard.spikes.open", {**SPIKE, "losses": []}, "an open event of 1 steps has 0 losses"),
    ("guard.spikes.open", {**SPIKE, "center": None}, "key 'center' must be an object"),
    (
        "guard.spikes.open",
        {**SPIKE, "center": {**SPIKE["center"], "log_grad_sd": 0}},  # type: ignore[dict-item]
        "key 'log_grad_sd' must be a number above 0, is 0",
    ),
    ("identity", GONE, "identity is missing"),
    ("identity", {}, "identity: key 'model' is missing"),
    ("identity", "x", "key 'identity' must be an object, is 'x'"),
    ("identity.model", 3, "identity: key 'model' must be an object, is 3"),
    ("identity.batch.global_sequences", "12", "must be a whole number above 0, is '12'"),
    ("identity.data.order", {}, "identity.data: key 'order' must be a list, is {}"),
    ("identity.data.order", ["chunk_000"], "identity.data.order[0]: must be an object"),
    ("probe", "x", "key 'probe' must be an object, is 'x'"),
    ("probe", {}, "probe: key 'sha256' is missing"),
    ("probe.sha256", 7, "probe: key 'sha256' must be text, is 7"),
    ("probe.values", [], "values are 0 rows of [] logits for 8 positions"),
    ("probe.values", [["x"]] * 8, "must be a number, is 'x'"),
    ("probe.max_abs", "large", "probe: key 'max_abs' must be a number, is 'large'"),
    ("probe.prompt", None, "probe: key 'prompt' must be an object"),
    ("probe.prompt.num_layers", 0, "must be a whole number above 0, is 0"),
    ("probe.signature.precision", "int3", "probe.signature: key 'precision'"),
    ("layout", [], "key 'layout' must be an object, is []"),
    ("layout", {}, "layout: key 'tensor' is missing"),
    ("layout.tensor", 0, "layout: key 'tensor' must be a whole number above 0, is 0"),
    ("parent", "x", "key 'parent' must be an object, is 'x'"),
    ("parent", {}, "parent: key 'parent' is missing"),
    ("parent", {**STAGE, "parent_adam_steps": -1}, "must be a whole number from 0, is -1"),
    ("state", "x", "key 'state' must be an object, is 'x'"),
    ("state.digests", [], "state: key 'digests' is not an object"),
    ("state.root", None, "state: key 'root' must be text"),
    ("config", [], "key 'config' must be an object, is []"),
    ("data", "x", "key 'data' must be an object, is 'x'"),
    ("data.vocab_size", -1, "data: key 'vocab_size' must be a whole number from 0"),
    ("environment", 3, "key 'environment' must be an object, is 3"),
    ("tensors", [], "key 'tensors' must be an object, is []"),
    ("files", [], "key 'files' must be an object, is []"),
    ("name", "ckpt_002", "belongs to ckpt_002"),
    ("format", "2", "key 'format' must be a whole number from 0"),
)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    MUTATIONS,
    ids=[f"{place} {value!r:.30}" for place, value, _ in MUTATIONS],
)
def test_a_sealed_manifest_that_makes_no_sense_is_passed_over(
    base: Path,
    stopped: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
    value: Any,
    words: str,
) -> None:
    """The one before is taken, with the reason; asked for by number, it is an error of the user."""
    reseal(newest(base), put(place, value))
    begun = start(base, stopped)
    assert [path.name for path in begun.candidates] == ["ckpt_000"]
    (reason,) = begun.refused
    assert words in reason and "ckpt_001" in reason and reason.isprintable(), reason

    config = write_yaml(base / "c.yaml", tree_in(base, stopped / "data"))
    assert train_command.main([str(config), "run.resume=1"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("k2train: run.resume asks for ckpt_001") and words in line


@pytest.mark.parametrize(
    ("place", "value"),
    (
        ("loss", "nan"),
        ("loss", "inf"),
        ("loss", None),
        ("attempt", GONE),
        ("layout", GONE),
        ("probe", GONE),
        ("parent", STAGE),
        ("guard.spikes.open", SPIKE),
        ("guard.finite.total", 5),
        ("later", {"key": [1]}),
        ("identity.data.later", 1),
        ("probe.prompt.later", "x"),
        ("guard.spikes.later", 1),
    ),
    ids=str,
)
def test_what_a_run_may_have_written_is_believed(
    base: Path, stopped: Path, place: str, value: Any
) -> None:
    """Catches a check that refuses checkpoints of older or later versions."""
    if place == "identity.data.later":
        # Part of the run's identity: told as a difference, never as damage.
        reseal(newest(base), put(place, value))
        with pytest.raises(
            CheckpointError, match=r"belongs to another run.*data.later: 1 -> absent"
        ):
            start(base, stopped)
        return
    reseal(newest(base), put(place, value))
    begun = start(base, stopped)
    assert [path.name for path in begun.candidates] == ["ckpt_001", "ckpt_000"], begun.refused


def test_updates_of_the_stage_before_count(base: Path, stopped: Path) -> None:
    """Moments that were taken over bring their updates; those that were left do not."""
    for kept, adam_steps, taken in ((True, 45, 1), (True, 46, 0), (False, 6, 0), (False, 5, 1)):
        reseal(newest(base), put("parent", {**STAGE, "moments_kept": kept}))
        reseal(newest(base), put("adam_steps", adam_steps))
        assert start(base, stopped).candidates[0].name == f"ckpt_00{taken}", (kept, adam_steps)


def test_another_batch_is_told_as_such(base: Path, stopped: Path) -> None:
    """Catches a change of the config that passes for damage of every checkpoint."""
    for changes, words in (
        ({"batch__global_sequences": 6}, "batch.global_sequences: 12 -> 6"),
        ({"data__order": [1, 0]}, "data.order at position 0"),
    ):
        with pytest.raises(CheckpointError, match="ckpt_001 belongs to another run") as caught:
            start(base, stopped, **changes)
        assert words in str(caught.value)


def test_checkpoints_that_are_gone_are_told(base: Path, stopped: Path) -> None:
    """Catches a run that begins at step 0, since the disk of its checkpoints is not mounted, and
    one that goes back without a word.
    """
    folder, ledger = base / "runs" / "run" / "checkpoints", base / "runs" / "run" / "ledger.jsonl"
    assert start(base, stopped).refused == ()
    newest(base).rename(base / "kept")
    begun = start(base, stopped)
    assert begun.candidates[0].name.startswith("ckpt_000")
    assert begun.refused == (f"ckpt_001, step 5: is in the ledger, but not in {folder}",)

    # One that was set aside by a start that was killed before it said so.
    (folder / "set_aside_by_attempt_2").mkdir()
    (base / "kept").rename(folder / "set_aside_by_attempt_2" / "ckpt_001")
    assert start(base, stopped).refused == ()

    shutil.rmtree(folder)
    with pytest.raises(RunError) as caught:
        start(base, stopped)
    assert str(caught.value) == (
        f"{folder} has no checkpoint, and the ledger records 1 checkpoint up to ckpt_001, step 5: "
        "mount their disk or bring them back; to start anew choose another run.name"
    )
    ledger.unlink()
    (ledger.parent / "ledger.head").unlink()
    assert start(base, stopped).candidates == ()


def test_metrics_that_end_early_are_told(pool: GlooPool, base: Path, stopped: Path) -> None:
    """Catches a start that appends to what is left of the record, without a word."""
    metrics = base / "runs" / "run" / "metrics.jsonl"
    tree = tree_in(base, stopped / "data", run__stop_after_steps=1)
    path = write_yaml(base / "run.yaml", tree)
    assert "lines are lost" not in train(path).stderr
    metrics.unlink()
    told = train(path).stderr
    assert f"{metrics} ends with step 0, ckpt_001_step_000006 is of step 6: lines are lost" in told


def test_the_run_goes_on_from_the_one_before(pool: GlooPool, base: Path, stopped: Path) -> None:
    """Catches a reason that only the first look has: every rank checks what it takes."""
    for place, value, _ in (MUTATIONS[0], ("probe", {}, "")):
        reseal(newest(base), put(place, value))
        tree = tree_in(base, stopped / "data", run__stop_after_steps=1)
        assert pool.run(2, trainer_job, tree) == [75, 75]
        ledger = (base / "runs" / "run" / "ledger.jsonl").read_text()
        assert '"resumed"' in ledger and '"checkpoint": "ckpt_000' in ledger
        shutil.rmtree(base / "runs")
        shutil.copytree(stopped / "runs", base / "runs")
