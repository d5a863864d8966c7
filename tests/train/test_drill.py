"""Resume drill of a run: a restart that lost something stops at its second step."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2train.record.events import Stopped, of_kind
from k2train.record.followed_events import CheckpointFollowed, ResumeDrilled
from k2train.record.ledger import read_ledger
from k2train.train.drill import ResumeDrill
from k2train.train.followed import Comparison, Recorded
from k2train.train.rounding import Rounding
from k2train.train.trainer import Trainer
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, nothing, trainer_job

CHUNKS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drill")
    make_corpus(folder / "data", CHUNKS)
    return folder


def tree(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    return config_tree(base / "data" / "manifest.json", base / "runs", name, **changes)


@pytest.fixture(scope="module")
def straight(base: Path, pool: GlooPool) -> Path:
    assert pool.run(1, trainer_job, tree(base, "straight")) == [0]
    return base / "runs" / "straight"


def drills(run: Path) -> list[ResumeDrilled]:
    return of_kind(read_ledger(run / "ledger.jsonl"), ResumeDrilled)


def copied(base: Path, straight: Path, name: str) -> Path:
    """A copy of the run as it was after its second chunk."""
    run = base / "runs" / name
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "ckpt_003")
    return run


def test_every_checkpoint_has_its_two_steps(straight: Path) -> None:
    """Catches a checkpoint whose steps are not recorded, and numbers other than the metrics'."""
    followed = of_kind(read_ledger(straight / "ledger.jsonl"), CheckpointFollowed)
    assert [(e.checkpoint, [s.step for s in e.steps]) for e in followed] == [
        ("ckpt_000", [1, 2]),
        ("ckpt_001", [6, 7]),
        ("ckpt_002", [11, 12]),
    ]


def test_the_first_save_is_loaded_again(straight: Path) -> None:
    """Catches a run that never tries what it saved, and one that tries the empty ckpt_000."""
    (drill,) = drills(straight)
    assert (drill.checkpoint, drill.reloaded, drill.bits, drill.same) == (
        "ckpt_001",
        True,
        True,
        True,
    )


def no_moments(trainer: Trainer) -> None:
    trainer.engine.optimizer.exp_avg.zero_()


def no_count(trainer: Trainer) -> None:
    trainer.engine.optimizer.adam_steps = 0


def no_weights(trainer: Trainer) -> None:
    trainer.engine.optimizer.master.zero_()
    trainer.engine.optimizer.write_parameters()


@pytest.mark.parametrize(
    ("forget", "steps"), ((nothing, 0), (no_weights, 1), (no_moments, 2), (no_count, 2))
)
def test_a_restart_that_lost_something_stops(
    base: Path,
    straight: Path,
    pool: GlooPool,
    forget: Callable[[Trainer], None],
    steps: int,
) -> None:
    """Exit 1 at the first step without the weights, at the second without moments or count."""
    run = copied(base, straight, f"forgets-{forget.__name__}")
    code = pool.run(1, trainer_job, tree(base, run.name), forget)
    last = drills(run)[-1]
    assert last.checkpoint == "ckpt_002" and last.bits and not last.reloaded
    if not steps:
        assert code == [0] and last.same and last.steps == 2
        return
    assert code == [1] and not last.same and last.steps == steps
    stopped = of_kind(read_ledger(run / "ledger.jsonl"), Stopped)[-1]
    assert stopped.step == 10 + steps and "resume drill of ckpt_002" in str(stopped.problem)
    assert ("the weights are whole" in str(stopped.problem)) == (steps == 2)


def test_a_checkpoint_that_a_machine_does_not_see_yet_is_left_alone(tmp_path: Path) -> None:
    """Catches a rank that finds no file where rank 0 does, and leaves the others waiting."""
    drill, seen = object.__new__(ResumeDrill), [True, True]

    class Told:
        def sum(self, lacking: torch.Tensor, *_: object) -> torch.Tensor:
            return lacking + sum(not there for there in seen[1:])

    drill._agreement = Told()  # type: ignore[assignment]
    assert drill._is_there(tmp_path)
    seen[1] = False
    assert not drill._is_there(tmp_path)


def test_off_goes_on(base: Path, straight: Path, pool: GlooPool) -> None:
    """Catches a key that does nothing."""
    run = copied(base, straight, "off")
    changes = {"audit__resume_drill": "off"}
    assert pool.run(1, trainer_job, tree(base, "off", **changes), no_moments) == [0]
    assert len(drills(run)) == 1, "that of the copied run"


def test_another_layout_is_compared_within_rounding(
    base: Path, straight: Path, pool: GlooPool
) -> None:
    """Two more processes: the recorded steps hold within rounding, and lost moments do not.

    The new setting then tries its own first save.
    """
    for name, forget, code in (("layout", nothing, 0), ("layout-lost", no_moments, 1)):
        run = copied(base, straight, name)
        changes = {"parallel__tensor": 2}
        assert pool.run(2, trainer_job, tree(base, name, **changes), forget) == [code] * 2
        told = [(drill.bits, drill.same, drill.reloaded) for drill in drills(run)[1:]]
        assert told[0] == (False, not code, False)
        assert any("tensor 1 -> 2" in fact for fact in drills(run)[1].changed)


def test_a_stop_right_after_a_save_is_drilled_by_an_older_checkpoint(
    base: Path, straight: Path, pool: GlooPool
) -> None:
    """Nothing is on record after the last checkpoint, so the one before it is tried first."""
    run = base / "runs" / "older"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "ckpt_003")
    # One step on, saved by the stop: no step after it is known.
    stop = tree(base, "older", run__stop_after_steps=3)
    assert pool.run(1, trainer_job, stop) == [75]
    go_on = tree(base, "older", parallel__tensor=2)
    assert pool.run(2, trainer_job, go_on) == [0, 0]
    last = [drill for drill in drills(run) if "tensor 1 -> 2" in drill.changed]
    assert [(drill.checkpoint, drill.same) for drill in last] == [("ckpt_002", True)]


def test_the_line_says_why_bits_are_not_compared() -> None:
    """Catches a resume with other compiled code, or another layout, that keeps it to itself."""
    lines: list[str] = []
    logger = SimpleNamespace(attempt=2, event=lambda event: None, info=lines.append)
    judging: Any = SimpleNamespace(logger=logger, setting={}, _due=True)
    recorded = Recorded("ckpt_001", "a" * 64, {}, "config", ())
    changed = ("kernels nothing -> compiled code 2",)
    for rounding, facts in ((Rounding("fp32"), changed), (Rounding("fp32"), ()), (None, ())):
        ResumeDrill._judge(judging, Comparison(recorded, rounding, done=2), facts, False)
    how = [line.removeprefix("resume drill: the first 2 steps after ckpt_001: ") for line in lines]
    assert how == [
        "as recorded, within rounding (kernels nothing -> compiled code 2)",
        "as recorded, within rounding (kernels that are not deterministic)",
        "as recorded, to the bit",
    ]
