"""Saves that were asked for stay, the others say when they go: whole runs."""

from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.checkpoint.manifest import list_checkpoints
from k2train.checkpoint.retention import KEEP
from k2train.checkpoint.verify import verify_checkpoint
from k2train.guard.control_files import ControlFiles, SaveRequest
from k2train.record.events import CheckpointRemoved, CheckpointSaved, of_kind
from k2train.record.ledger import read_ledger
from k2train.record.system_info import JOB_VARIABLES, in_batch_job
from k2train.train.monitor import STOP_FILE, RunMonitor
from k2train.train.trainer import Trainer
from tests.support.forkserver import PATIENCE_SECONDS
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import (
    STEPS_PER_CHUNK,
    config_tree,
    make_corpus,
    train,
    trainer_job,
    write_yaml,
)
from tools.show_run import checkpoint_rows


def test_a_save_that_was_asked_for_stays(tmp_path: Path) -> None:
    """Catches a SAVE file whose checkpoint two chunks later is gone, and another save that goes
    without a line, an event and a reason.
    """
    make_corpus(tmp_path / "data", 3, held_out=False)
    settings = config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "run")
    path, run = write_yaml(tmp_path / "run.yaml", settings), tmp_path / "runs" / "run"
    assert train(path, "run.stop_after_steps=2").returncode == 75
    (run / "SAVE").touch()
    done = train(path)
    assert done.returncode == 0, done.stderr

    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["ckpt_000", "ckpt_000_step_000003", "ckpt_001", "ckpt_002", "ckpt_003"]
    kept = run / "checkpoints" / "ckpt_000_step_000003"
    assert (kept / KEEP).read_text() == "SAVE file\n"
    assert verify_checkpoint(kept).asked == "SAVE file"

    entries = read_ledger(run / "ledger.jsonl")
    saved = {event.checkpoint: event.asked for event in of_kind(entries, CheckpointSaved)}
    assert {name for name, asked in saved.items() if asked} == {"ckpt_000_step_000003"}
    (removed,) = of_kind(entries, CheckpointRemoved)
    assert removed.checkpoint == "ckpt_000_step_000002"
    assert f"removed ckpt_000_step_000002, saved inside a chunk: {removed.reason}" in done.stderr
    assert "; kept, asked for by SAVE file" in done.stderr
    paths = {row["checkpoint"]: row["path"] for row in checkpoint_rows(run)}
    assert paths["ckpt_000_step_000002"].endswith("(removed: 2 newer ones are verified)")


def slow_save(trainer: Trainer) -> None:
    """Let the save of chunk 1 run until the one that a SAVE file asks for waits for it."""
    manager, monitor = trainer.checkpoints, trainer.monitor
    # The first checkpoint is whole by now.
    manager.wait(0)
    check, committed, begin, wait = (
        manager.check_owner,
        manager.committed,
        monitor.begin_step,
        manager.wait,
    )
    release, request = Event(), monitor.control_files.directory / "SAVE"

    def held() -> None:
        assert release.wait(PATIENCE_SECONDS)
        check()

    def committed_then(path: Path, manifest: Any) -> None:
        committed(path, manifest)
        with (request.parent / "seen").open("a") as seen:
            seen.write(f"{path.name} {request.exists()}\n")

    def begun(step: int, *given: Any, **more: Any) -> list[float]:
        if step == STEPS_PER_CHUNK + 1:
            assert more["saving"], "the save of the chunk runs in the background"
            request.touch()
        return begin(step, *given, **more)

    def waited(step: int, *given: Any) -> None:
        if step > STEPS_PER_CHUNK:
            release.set()
        wait(step, *given)

    manager.check_owner, manager.committed = held, committed_then  # type: ignore[method-assign]
    monitor.begin_step, manager.wait = begun, waited  # type: ignore[method-assign,assignment]


def test_a_save_that_is_asked_for_during_a_save_stays(pool: GlooPool, tmp_path: Path) -> None:
    """Catches a request that is taken for met by the save before it, whose checkpoint is removed
    later, and which a kill in between loses.
    """
    make_corpus(tmp_path / "data", 4, held_out=False)
    settings = config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "run")
    assert pool.run(1, trainer_job, settings, slow_save) == [0]

    run, asked_for = tmp_path / "runs" / "run", f"ckpt_001_step_{STEPS_PER_CHUNK + 1:06d}"
    assert (run / "seen").read_text().splitlines()[:2] == ["ckpt_001 True", f"{asked_for} False"]
    kept = [path for path in list_checkpoints(run / "checkpoints") if (path / KEEP).exists()]
    assert [path.name for path in kept] == [asked_for]
    assert verify_checkpoint(kept[0]).asked == "SAVE file"


def signalled(trainer: Trainer, name: str) -> None:
    """Let a signal come in the first step of this start."""
    begin = trainer.monitor.begin_step

    def begun(step: int, *given: Any, **more: Any) -> list[float]:
        if step == trainer.first_step:
            trainer.monitor.stop.requested = name
        return begin(step, *given, **more)

    trainer.monitor.begin_step = begun  # type: ignore[method-assign]


def test_saves_of_preemptions_go_and_those_of_ctrl_c_stay(pool: GlooPool, tmp_path: Path) -> None:
    """Catches a disk that fills with the saves of preemptions outside SLURM."""
    make_corpus(tmp_path / "data", 3, held_out=False)
    settings = config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "run")
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        assert pool.run(1, trainer_job, settings, partial(signalled, name=name)) == [75]
    run = tmp_path / "runs" / "run"
    inside = [f"ckpt_000_step_{step:06d}" for step in (1, 2, 3)]
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["ckpt_000", *inside]

    assert pool.run(1, trainer_job, settings) == [0]
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["ckpt_000", inside[1], "ckpt_001", "ckpt_002", "ckpt_003"]
    assert (run / "checkpoints" / inside[1] / KEEP).read_text() == "SIGINT\n"
    removed = of_kind(read_ledger(run / "ledger.jsonl"), CheckpointRemoved)
    assert [event.checkpoint for event in removed] == [inside[0], inside[2]]


def test_a_save_file_outlives_a_stop_by_signal(tmp_path: Path) -> None:
    """Catches a request that a stop removes, although its save is not kept."""
    files = ControlFiles(tmp_path)
    for name in ("STOP", "SAVE"):
        (tmp_path / name).touch()
    monitor: Any = SimpleNamespace(
        grid=SimpleNamespace(rank=0), control_files=files, _stop_file=False
    )
    RunMonitor.stopped(monitor)
    assert files.poll() == "SAVE"
    monitor._stop_file = True
    RunMonitor.stopped(monitor)
    assert files.poll() is None


@pytest.mark.parametrize(
    ("requested", "save", "in_job", "asked"),
    (
        (None, False, False, None),
        (None, True, True, "SAVE file"),
        ("SIGTERM", False, False, None),
        ("SIGUSR1", False, False, None),
        ("SIGUSR2", False, True, None),
        ("SIGINT", False, False, "SIGINT"),
        ("SIGHUP", False, False, "SIGHUP"),
        ("SIGINT", False, True, None),
        ("SIGTERM", True, True, "SAVE file"),
        (STOP_FILE, False, True, STOP_FILE),
    ),
)
def test_who_asked(requested: Any, save: bool, in_job: bool, asked: str | None) -> None:
    """Catches a disk that fills with the saves of a batch system's time limits."""
    request = SaveRequest()
    if save:
        request.see()
    monitor: Any = SimpleNamespace(
        stop=SimpleNamespace(requested=requested),
        _save_request=request,
        _stop_file=False,
        _is_in_job=in_job,
    )
    assert RunMonitor.asked(monitor, "ckpt_001") == asked
    # A stop file counts after a signal, too.
    monitor._stop_file = True
    assert RunMonitor.asked(monitor, "ckpt_002") == STOP_FILE


@pytest.mark.parametrize("name", ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID"))
def test_batch_systems_are_known(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a batch system whose SIGINT at a time limit is taken for a person's."""
    for variable in JOB_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert not in_batch_job()
    monkeypatch.setenv(name, "1")
    assert in_batch_job()
