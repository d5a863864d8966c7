"""Held-out evaluation: a stop between batches that all ranks obey, and what it leaves behind."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from k2train.checkpoint.manifest import list_checkpoints
from k2train.checkpoint.verify import verify_checkpoint
from k2train.launch.environment import Launch
from k2train.record.events import CheckpointSaved, Stopped
from k2train.record.ledger import read_ledger
from k2train.record.metrics import read_metrics
from k2train.train.engine import Engine
from k2train.train.trainer import Trainer
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, trainer_job

SIGNALLED = 1
"""The rank that gets the signal: the others have to learn of it."""


def tree_of(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    if not (base / "data").exists():
        make_corpus(base / "data", 2)
    tree = config_tree(base / "data" / "manifest.json", base / "runs", name, **changes)
    tree["batch"]["micro_sequences"] = 3
    return tree


def asking(trainer: Trainer, nth: int) -> None:
    """Let one rank be asked to stop during its `nth` evaluated batch."""
    evaluate, count = trainer.engine.row_losses, [0]

    def evaluated(*given: Any, **more: Any) -> Tensor:
        count[0] += 1
        if trainer.engine.grid.rank == SIGNALLED and count[0] == nth:
            trainer.monitor.stop.requested = "SIGTERM"
        return evaluate(*given, **more)

    trainer.engine.row_losses = evaluated  # type: ignore[method-assign]


def asked_at_first(launch: Launch, tree: dict[str, Any]) -> int | str:
    """A run that is asked to stop in the evaluation before its first step."""
    evaluate = Engine.row_losses
    runs: list[Any] = []

    def evaluated(engine: Engine, *given: Any, **more: Any) -> Tensor:
        if launch.rank == SIGNALLED:
            runs[0].requested = "SIGTERM"
        return evaluate(engine, *given, **more)

    from tests.support import tiny_corpus

    real = tiny_corpus.StopRequest

    def noted() -> Any:
        runs.append(real())
        return runs[0]

    with (
        mock.patch.object(Engine, "row_losses", evaluated),
        mock.patch.object(tiny_corpus, "StopRequest", noted),
    ):
        return trainer_job(launch, tree)


def test_a_stop_in_the_first_evaluation_begins_no_step(pool: GlooPool, tmp_path: Path) -> None:
    """Catches minutes of evaluation, a save and a whole step after the signal."""
    tree = tree_of(tmp_path, "first")
    assert pool.run(2, asked_at_first, tree) == [75, 75]
    run = tmp_path / "runs" / "first"
    assert list_checkpoints(run / "checkpoints") == [] and not (run / "metrics.jsonl").exists()
    last = read_ledger(run / "ledger.jsonl")[-1].event
    assert isinstance(last, Stopped) and last.step == 0
    # The same command then begins like a first start.
    assert pool.run(2, trainer_job, tree) == [0, 0]
    first = list_checkpoints(run / "checkpoints")[0]
    assert first.name == "ckpt_000" and len(read_metrics(run / "metrics.jsonl")) == 10


def test_a_stop_in_a_later_evaluation_saves_without_a_score(pool: GlooPool, tmp_path: Path) -> None:
    """Catches a step that is begun after the signal, and a chunk that is trained again."""
    tree = tree_of(tmp_path, "later")
    assert pool.run(2, trainer_job, tree, partial(asking, nth=1)) == [75, 75]
    run = tmp_path / "runs" / "later"
    assert len(read_metrics(run / "metrics.jsonl")) == 5
    newest = list_checkpoints(run / "checkpoints")[-1]
    verify_checkpoint(newest)
    events = [entry.event for entry in read_ledger(run / "ledger.jsonl")]
    saved = [event for event in events if isinstance(event, CheckpointSaved)]
    assert newest.name == "ckpt_001" and saved[-1].held_out_loss is None
    assert saved[0].held_out_loss is not None
    assert pool.run(2, trainer_job, tree) == [0, 0]


def in_forward(trainer: Trainer, step: int) -> None:
    """Let one rank be asked to stop while a step computes."""
    run = trainer.engine._run

    def ran(*given: Any) -> Any:
        if trainer.engine.grid.rank == SIGNALLED and trainer.state.step == step:
            trainer.monitor.stop.requested = "SIGTERM"
        return run(*given)

    trainer.engine._run = ran  # type: ignore[method-assign,assignment]


def test_a_stop_during_a_step_is_of_that_step(pool: GlooPool, tmp_path: Path) -> None:
    """Catches a whole further step, because the flags were read when this one began."""
    tree = tree_of(tmp_path, "step")
    assert pool.run(2, trainer_job, tree, partial(in_forward, step=2)) == [75, 75]
    run = tmp_path / "runs" / "step"
    assert len(read_metrics(run / "metrics.jsonl")) == 2
    assert list_checkpoints(run / "checkpoints")[-1].name == "ckpt_000_step_000002"


def asking_at(trainer: Trainer, step: int) -> None:
    """Let one rank be asked to stop while the weights after `step` are evaluated."""
    evaluate = trainer.engine.row_losses

    def evaluated(*given: Any, **more: Any) -> Tensor:
        if trainer.engine.grid.rank == SIGNALLED and trainer.state.step == step:
            trainer.monitor.stop.requested = "SIGTERM"
        return evaluate(*given, **more)

    trainer.engine.row_losses = evaluated  # type: ignore[method-assign]


@pytest.mark.parametrize("moment", (asking_at, in_forward))
def test_a_stop_at_the_end_of_the_stage_loses_no_score(
    pool: GlooPool, tmp_path: Path, moment: Callable[..., None]
) -> None:
    """Catches a stage that is finished, with 0, although its last loss was never computed."""
    tree, last = tree_of(tmp_path, "end"), 10
    run = tmp_path / "runs" / "end"
    assert pool.run(2, trainer_job, tree, partial(moment, step=last)) == [75, 75]
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.name == f"ckpt_001_step_{last:06d}"
    assert verify_checkpoint(newest).held_out_loss is None
    event = read_ledger(run / "ledger.jsonl")[-1].event
    assert isinstance(event, Stopped) and event.step == last

    # Asked once more: still nothing is lost, and nothing is written again.
    assert pool.run(2, trainer_job, tree, partial(asking_at, step=last)) == [75, 75]
    assert list_checkpoints(run / "checkpoints")[-1] == newest
    assert pool.run(2, trainer_job, tree) == [0, 0]
    assert pool.run(2, trainer_job, tree) == ["finished: ckpt_002"] * 2

    undisturbed = tree_of(tmp_path, "undisturbed")
    assert pool.run(2, trainer_job, undisturbed) == [0, 0]
    found, expected = (
        verify_checkpoint(tmp_path / "runs" / name / "checkpoints" / "ckpt_002")
        for name in ("end", "undisturbed")
    )
    assert found.held_out is not None and found.held_out == expected.held_out
    assert found.state == expected.state
    assert [row.step for row in read_metrics(run / "metrics.jsonl")] == list(range(1, last + 1))


def spoiling(trainer: Trainer, file: Path) -> None:
    """Change a bit of the held-out chunk after the last step."""
    train_step = trainer.train_step

    def trained() -> Any:
        result = train_step()
        if trainer.state.step == 10:
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return result

    trainer.train_step = trained  # type: ignore[method-assign]


def test_a_damaged_last_evaluation_is_made_up_for(pool: GlooPool, tmp_path: Path) -> None:
    """Catches a stage that counts as finished after its last evaluation found a damaged file."""
    tree = tree_of(tmp_path, "damaged")
    file = tmp_path / "data" / "held_out.npy"
    good = file.read_bytes()

    (line,) = pool.run(1, trainer_job, tree, partial(spoiling, file=file))
    assert "held_out" in line
    run = tmp_path / "runs" / "damaged"
    assert list_checkpoints(run / "checkpoints")[-1].name == "ckpt_001_step_000010"
    file.write_bytes(good)
    assert pool.run(1, trainer_job, tree) == [0]
    assert verify_checkpoint(run / "checkpoints" / "ckpt_002").held_out_loss is not None
