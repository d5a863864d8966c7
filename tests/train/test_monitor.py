"""Health checks in whole runs: non-finite steps, flipped bits, request files, recorded state roots.

Would catch a step that one rank skips and another applies, a damaged replica that trains on, and a
request that is met twice or never.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from k2train import fault_injection
from k2train.checkpoint.manifest import list_checkpoints, seal
from k2train.record.events import CheckpointSaved, E, StepSkipped, Stopped, of_kind
from k2train.record.ledger import read_ledger
from k2train.record.metrics import read_metrics, read_roots
from k2train.train.forward_check import run_forward_check
from k2train.train.trainer import Trainer
from tests.support.gloo_pool import GlooPool
from tests.support.lanes import lanes
from tests.support.tiny_corpus import (
    STEPS_PER_CHUNK,
    audited_tree,
    make_corpus,
    manifest_of,
    trainer_job,
)

STEPS = 2 * STEPS_PER_CHUNK


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("monitor")
    make_corpus(folder / "data", 2, held_out=False)
    return folder


def armed(text: str, trainer: Trainer) -> None:
    fault_injection.arm(text, trainer.engine.grid.rank)


def run_with(pool: GlooPool, world: int, tree: dict[str, Any], text: str) -> list[int | str]:
    """A run with faults; every run of a worker begins without any."""
    return pool.run(world, trainer_job, tree, partial(armed, text))


def events(base: Path, name: str, kind: type[E]) -> list[E]:
    return of_kind(read_ledger(base / "runs" / name / "ledger.jsonl"), kind)


def tensors(base: Path, name: str) -> dict[int, Mapping[str, str]]:
    rows = read_roots(base / "runs" / name / "state_roots.jsonl")
    return {row.step: row.tensors for row in rows}


NOT_FINITE: tuple[tuple[dict[str, int], str, str | None], ...] = (
    ({}, "gradient@rank=0@step=4:nan=embedding.weight", "embedding.weight"),
    ({}, "gradient@rank=1@step=4:inf=layers.2.mlp.gate.weight", "layers.2.mlp.gate.weight"),
    ({"parallel__tensor": 2}, "gradient@rank=1@step=4:nan=norm.weight", "norm.weight"),
    (
        {"parallel__tensor": 2},
        "gradient@rank=0@step=4:nan=layers.0.attention.key.weight",
        "layers.0.attention.key.weight",
    ),
    ({"parallel__pipeline": 2}, "gradient@rank=1@step=4:inf=head.weight", "head.weight"),
    ({"parallel__pipeline": 2}, "loss@rank=1@step=4@nth=1:nan", None),
    ({"parallel__pipeline": 2}, "loss@rank=1@step=4@nth=4:inf", None),
    ({}, "loss@rank=1@step=4@nth=2:nan", None),
)


@pytest.mark.parametrize(
    *lanes(
        ("layout", "fault", "tensor"),
        NOT_FINITE,
        lambda case: NOT_FINITE.index(case) in (0, 2, 4, 6),
    )
)
def test_what_is_not_finite_costs_one_step_on_every_rank(
    base: Path, pool: GlooPool, layout: dict[str, int], fault: str, tensor: str | None
) -> None:
    """By rank, tensor and micro-batch: exactly that step is left out, no bit of the state moves,
    and it is reported with the rows it read.

    The next step is applied.
    """
    name = fault.replace(":", "-").replace("@", "-").replace("=", "") + "".join(layout)
    assert run_with(pool, 2, audited_tree(base, name, **layout), fault) == [0, 0]
    applied = {
        row.step: row.applied for row in read_metrics(base / "runs" / name / "metrics.jsonl")
    }
    assert applied == {step: step != 4 for step in range(1, STEPS + 1)}
    states = tensors(base, name)
    assert states[4] == states[3] and all(
        states[5][key] != value for key, value in states[4].items()
    )
    (skipped,) = events(base, name, StepSkipped)
    assert skipped.step == 4 and skipped.chunk == "chunk_000"
    assert tensor is None or tensor in skipped.tensors
    assert (
        manifest_of(list_checkpoints(base / "runs" / name / "checkpoints")[-1])["adam_steps"]
        == STEPS - 1
    )


def test_three_in_a_row_stop(base: Path, pool: GlooPool) -> None:
    fault = ";".join(f"gradient@rank=1@step={step}:nan" for step in (6, 7, 8))
    assert run_with(pool, 2, audited_tree(base, "three"), fault) == [1, 1]
    assert events(base, "three", Stopped)[-1].reason == "non-finite"
    assert [event.in_a_row for event in events(base, "three", StepSkipped)] == [1, 2, 3]


def remembering(text: str, trainer: Trainer) -> None:
    """The state of both guards is that of the checkpoint, before the first step of a restart."""
    armed(text, trainer)
    newest = list_checkpoints(trainer.start.checkpoints)[-1]
    assert trainer.state.to_json() == {
        key: manifest_of(newest)[key] for key in trainer.state.to_json()
    }
    assert trainer.state.guard.finite.in_a_row == 2


def test_bad_steps_are_counted_across_a_restart(base: Path, pool: GlooPool) -> None:
    """Two before it and one after it are three in a row: a restart in between must not forget the
    first.
    """
    tree = audited_tree(base, "across", run__stop_after_steps=5)
    assert run_with(pool, 1, tree, "gradient@step=4:nan;gradient@step=5:nan") == [75]
    del tree["run"]["stop_after_steps"]
    assert pool.run(1, trainer_job, tree, partial(remembering, "gradient@step=6:nan")) == [1]
    assert events(base, "across", Stopped)[-1].reason == "non-finite"


FLIPS: tuple[tuple[dict[str, int], str, str], ...] = (
    (
        {},
        "weight@rank=1@step=6:flip=layers.1.mlp.up.weight",
        "weights of layers.1.mlp.up.weight on rank 1",
    ),
    ({}, "weight@rank=0@step=6:flip=norm.weight", "weights of norm.weight on rank 0"),
    ({"parallel__tensor": 2}, "moment@rank=1@step=6:flip=norm.weight.master", "norm.weight"),
    (
        {},
        "moment@rank=1@step=6:flip=head.weight.exp_avg_sq",
        "head.weight.exp_avg_sq on rank 1 changed",
    ),
    (
        {"parallel__pipeline": 2},
        "moment@rank=1@step=6:flip=head.weight.exp_avg",
        "head.weight.exp_avg on rank 1",
    ),
)


@pytest.mark.parametrize(
    *lanes(("layout", "fault", "words"), FLIPS, lambda case: case in (FLIPS[0], FLIPS[4]))
)
def test_a_bit_that_flips_stops_the_run(
    base: Path, pool: GlooPool, layout: dict[str, int], fault: str, words: str
) -> None:
    """With rank and tensor, before the update, so that the run started
    again is the run left alone.
    """
    name = "flip-" + fault.split("@")[0] + fault.rpartition("=")[2] + "".join(layout)
    assert run_with(pool, 2, audited_tree(base, name, **layout), fault) == [1, 1]
    (stopped,) = events(base, name, Stopped)
    assert stopped.reason == "damaged" and words in str(stopped.problem), stopped
    assert pool.run(2, trainer_job, audited_tree(base, name, **layout)) == [0, 0]
    alone = "alone" + "".join(layout)
    if not (base / "runs" / alone).exists():
        assert pool.run(2, trainer_job, audited_tree(base, alone, **layout)) == [0, 0]
    roots = [
        manifest_of(base / "runs" / each / "checkpoints" / "ckpt_002")["state"]["root"]
        for each in (name, alone)
    ]
    assert roots[0] == roots[1]


def touching(name: str, trainer: Trainer) -> None:
    if trainer.engine.grid.rank == 0:
        (trainer.start.directory / name).touch()


@pytest.mark.parametrize(("name", "code"), (("STOP", 75), ("SAVE", 0)))
def test_request_files(base: Path, pool: GlooPool, name: str, code: int) -> None:
    """A request is met once, and its file is removed: a save at the end of the next step, a stop
    before the first one.
    """
    tree = audited_tree(base, name)
    assert pool.run(2, trainer_job, tree, partial(touching, name)) == [code, code]
    run = base / "runs" / name
    assert not (run / name).exists()
    on_demand = [
        event for event in events(base, name, CheckpointSaved) if "step" in event.checkpoint
    ]
    assert [event.step for event in on_demand] == ([] if name == "STOP" else [1])
    if name == "STOP":
        assert events(base, name, Stopped)[-1].reason == "STOP file"
        (run / "STOP").touch()
        assert "asks this run not to start" in str(pool.run(1, trainer_job, tree)[0])


def test_a_model_that_computes_something_else_is_refused(base: Path, pool: GlooPool) -> None:
    """The manifest's forward check is changed and sealed again: every byte is whole, and the model
    is not what was saved.
    """
    tree = audited_tree(base, "probe", run__stop_after_steps=5)
    assert pool.run(1, trainer_job, tree) == [75]
    path = base / "runs" / "probe" / "checkpoints" / "ckpt_001" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["probe"]["values"][0][0] += 1.0
    manifest["probe"]["sha256"] = "0" * 64
    path.write_text(json.dumps(seal(manifest)))
    assert "does not compute what was saved" in str(pool.run(1, trainer_job, tree)[0])
    tree["run"]["allow"] = ["probe"]
    assert pool.run(1, trainer_job, tree) == [0]


def probing(trainer: Trainer) -> None:
    original: Callable[[], Any] = trainer.monitor.root

    def root() -> Any:
        run_forward_check(trainer.engine)
        return original()

    trainer.monitor.root = root  # type: ignore[method-assign]


def test_looking_changes_nothing(base: Path, pool: GlooPool) -> None:
    """With everything on at every step, and a probe in each, or with everything off: the same state
    to the bit.
    """
    off = {
        "audit__root_every_steps": 0,
        "audit__replicas_every_steps": 0,
        "watch__heartbeat_seconds": 0,
    }
    assert pool.run(2, trainer_job, audited_tree(base, "looked-at"), probing) == [0, 0]
    assert pool.run(2, trainer_job, audited_tree(base, "left", **off)) == [0, 0]
    roots = [
        manifest_of(base / "runs" / name / "checkpoints" / "ckpt_002")["state"]["root"]
        for name in ("looked-at", "left")
    ]
    assert roots[0] == roots[1]
    assert not (base / "runs" / "left" / "watch").exists()
