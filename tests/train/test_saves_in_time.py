"""Saves in time: a run that is killed again and again before its chunk ends goes on and finishes.

Steps are made slow, so that a save at half the time that an earlier start had is one step or more
before the next kill, however busy the machine is.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare_runs
import pytest

from k2train.record.events import CheckpointSaved, E, Resumed, SaveIntervalChosen, of_kind
from k2train.record.ledger import read_ledger
from tests.support import forkserver
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import (
    STEPS_PER_CHUNK,
    config_tree,
    environment,
    make_corpus,
    train,
    trainer_job,
    write_yaml,
)

STEP_SECONDS = 0.8
"""Far above what steps of two starts differ by: a save comes at half the time of the first."""
SLOW = ";".join(
    f"step.read@step={step}:sleep={STEP_SECONDS}" for step in range(1, STEPS_PER_CHUNK + 1)
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pool: GlooPool) -> Path:
    """Data of two chunks, and an undisturbed run."""
    folder = tmp_path_factory.mktemp("in_time")
    make_corpus(folder / "data", 2)
    assert pool.run(1, trainer_job, tree(folder, "whole")) == [0]
    return folder


def tree(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    # In the background a busy disk could take longer than the process lives.
    changes = {"checkpoint__asynchronous": False, **changes}
    changes.setdefault("run__allow", ["faults"])
    return config_tree(base / "data" / "manifest.json", base / "runs", name, **changes)


def killed_at(path: Path, *steps: int) -> None:
    """Starts of the run, each killed after one of the steps."""
    for step in steps:
        done = train(path, K2TRAIN_FAULTS=f"{SLOW};step.done@step={step}:kill")
        assert done.returncode == -9, done


def test_a_run_killed_again_and_again_finishes_with_the_same_bits(base: Path) -> None:
    """Catches a run that begins its first chunk for ever, or is refused for it."""
    path, run = write_yaml(base / "killed.yaml", tree(base, "killed")), base / "runs" / "killed"
    killed_at(path, 3, 4, 4)
    assert train(path, K2TRAIN_FAULTS=SLOW).returncode == 0

    entries = read_ledger(run / "ledger.jsonl")
    # The first start has begun at 0, and so has the second. Its last save, from half of three steps
    # on, is what the others go on from.
    begun = [resumed.step for resumed in of_kind(entries, Resumed)]
    assert begun[0] == 0 and 1 <= begun[1] <= begun[2] < 4
    inside = [saved for saved in of_kind(entries, CheckpointSaved) if "_step_" in saved.checkpoint]
    of_second = [saved.step for saved in inside if saved.attempt == 2]
    assert inside[0].attempt == 2 and of_second[-1] == begun[1]

    (first, *_) = of_kind(entries, SaveIntervalChosen)
    assert (first.attempt, first.step, first.failures) == (2, 1, 1)
    assert first.first_seconds is not None and first.trained_seconds > 3 * STEP_SECONDS
    assert first.first_seconds < first.trained_seconds / 2
    assert compare_runs.differences(base / "runs" / "whole", run, strict=True) == []


def test_nothing_is_saved_between_bad_steps(base: Path) -> None:
    """Catches a skipped step that stays skipped, although what made its gradient bad is gone: a
    save between the bad steps that stop a run is where the next start would go on.
    """
    settings = tree(base, "bad_steps", checkpoint__every_seconds=1e-6)
    path, run = write_yaml(base / "bad_steps.yaml", settings), base / "runs" / "bad_steps"
    bad = ";".join(f"gradient@rank=0@step={step}:nan" for step in (2, 3, 4))
    assert train(path, K2TRAIN_FAULTS=bad).returncode == 1

    saved = of_kind(read_ledger(run / "ledger.jsonl"), CheckpointSaved)
    assert [one.step for one in saved] == [0, 1], "it was time for a save after every step"
    assert train(path).returncode == 0
    assert compare_runs.differences(base / "runs" / "whole", run, strict=True) == []


def test_what_is_asked_for_between_bad_steps_is_saved_later(base: Path) -> None:
    """Catches a SAVE file that makes a skipped step stay skipped, and one that is forgotten."""
    path = write_yaml(base / "asked.yaml", tree(base, "asked", checkpoint__every_seconds=0))
    run = base / "runs" / "asked"
    assert train(path, "run.stop_after_steps=1").returncode == 75
    (run / "SAVE").touch()
    bad = ";".join(f"gradient@rank=0@step={step}:nan" for step in (2, 3, 4))
    assert train(path, K2TRAIN_FAULTS=bad).returncode == 1
    assert (run / "SAVE").exists(), "the request is not met yet"

    # What made them bad is gone: the next start does them again, and meets the request.
    assert train(path, "run.stop_after_steps=3").returncode == 75
    saved = of_kind(read_ledger(run / "ledger.jsonl"), CheckpointSaved)
    assert [(one.step, one.asked) for one in saved] == [
        (0, None),
        (1, None),
        (2, "SAVE file"),
        (4, None),
    ]
    assert not (run / "SAVE").exists()
    assert train(path).returncode == 0
    assert compare_runs.differences(base / "runs" / "whole", run, strict=True) == []

    # A good step after bad ones in the same start.
    path = write_yaml(base / "late.yaml", tree(base, "late", checkpoint__every_seconds=0))
    run = base / "runs" / "late"
    assert train(path, "run.stop_after_steps=1").returncode == 75
    (run / "SAVE").touch()
    assert train(path, K2TRAIN_FAULTS="gradient@rank=0@step=2:nan").returncode == 0
    saved = of_kind(read_ledger(run / "ledger.jsonl"), CheckpointSaved)
    assert [one.step for one in saved if one.asked] == [3]


def test_the_reason_is_told(base: Path) -> None:
    path = write_yaml(base / "told.yaml", tree(base, "told"))
    killed_at(path, 2)
    told = train(path, "run.stop_after_steps=1").stderr
    assert re.search(
        r"told saves .*, first after \d+s, since starts ended before they had saved: "
        r"1 failure in \d+s of training; .* \(checkpoint\.every_seconds: auto\)\n",
        told,
    ), told


def test_what_the_config_fixes_stays(base: Path) -> None:
    """0 is never, whatever happens; it is told what to do."""
    settings = tree(base, "never", checkpoint__every_seconds=0)
    path, run = write_yaml(base / "never.yaml", settings), base / "runs" / "never"
    killed_at(path, 1, 2, 3)
    done = train(path)
    assert done.returncode == 0
    assert "more often than it saves; set checkpoint.every_seconds=auto, or lower it" in done.stderr
    saved = of_kind(read_ledger(run / "ledger.jsonl"), CheckpointSaved)
    assert [event.checkpoint for event in saved] == ["ckpt_000", "ckpt_001", "ckpt_002"]


def test_a_run_without_failures_saves_as_before(base: Path) -> None:
    """Short chunks and no failure: nothing is said, and nothing saved but at chunk ends."""
    entries = read_ledger(base / "runs" / "whole" / "ledger.jsonl")
    assert not of_kind(entries, SaveIntervalChosen)
    saved = of_kind(entries, CheckpointSaved)
    assert [event.checkpoint for event in saved] == ["ckpt_000", "ckpt_001", "ckpt_002"]


@pytest.mark.slow
def test_the_launcher_brings_a_run_through_that_dies_each_third_step(
    base: Path, pool: GlooPool
) -> None:
    """Catches a run that is begun again as often as allowed and never gets on: each start is killed
    in its third step, and the chunk has five.
    """
    make_corpus(base / "one", 1)
    settings = tree(base, "launched", data__manifest=str(base / "one" / "manifest.json"))
    assert pool.run(1, trainer_job, {**settings, "run": {**settings["run"], "name": "one"}}) == [0]
    slow = ";".join(f"step.read@nth={visit}:sleep=0.4" for visit in (1, 2, 3))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "k2train.launch", "--restarts", "5", "--nproc-per-node", "1"),
            *("-m", "k2train.train", str(write_yaml(base / "launched.yaml", settings))),
        ],
        capture_output=True,
        text=True,
        timeout=forkserver.PATIENCE_SECONDS,
        env=environment(K2TRAIN_FAULTS=f"{slow};step.done@nth=3:kill"),
    )
    assert done.returncode == 0, done.stderr
    assert "start 3 of 6 follows in " in done.stderr
    begun = [resumed.step for resumed in _events(base, "launched", Resumed)]
    assert begun == sorted(begun) and 0 == begun[0] < begun[-1]
    assert (
        compare_runs.differences(base / "runs" / "one", base / "runs" / "launched", strict=True)
        == []
    )


def _events(base: Path, name: str, kind: type[E]) -> list[E]:
    return of_kind(read_ledger(base / "runs" / name / "ledger.jsonl"), kind)
