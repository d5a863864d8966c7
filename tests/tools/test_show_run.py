"""`tools/show_run.py`: catches wrong cells, a damaged run shown as whole, and tracebacks."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from k2train.record.events import CheckpointSaved, ChunkStarted, Finished, Started, Stopped
from k2train.record.ledger import Ledger
from k2train.record.metrics import MetricsWriter, StepRecord
from tests.support.command_line import HANG_SECONDS
from tests.support.events import event

ROOT = Path(__file__).resolve().parents[2]


def _show(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "show_run.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd="/", timeout=HANG_SECONDS, check=False
    )


def _manifest(directory: Path, name: str, facts: dict[str, Any]) -> str:
    folder = directory / "checkpoints" / name
    folder.mkdir(parents=True)
    data = json.dumps(facts).encode()
    (folder / "manifest.json").write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _run(directory: Path, finished: bool = True) -> Path:
    ledger, metrics = Ledger(directory / "ledger.jsonl"), MetricsWriter(directory / "metrics.jsonl")
    ledger.append(event(Started, run="demo", attempt=1, world_size=4))
    _manifest(directory, "ckpt_000", {"step": 0, "chunks_consumed": 0})

    for number, chunk in ((1, "chunk_004"), (2, "chunk_000")):
        ledger.append(event(ChunkStarted, chunk=chunk, order_index=number - 1, step=3 * number - 3))
        for step in range(3 * number - 2, 3 * number + 1):
            metrics.write(
                StepRecord(step, 1, loss=9.0 - step, seconds=0.5, consumed_tokens=1000 * step)
            )
        name = f"ckpt_{number:03d}"
        ledger.append(
            CheckpointSaved(
                checkpoint=name,
                attempt=1,
                step=3 * number,
                chunks_consumed=number,
                consumed_tokens=3000 * number,
                loss=9.0 - 3 * number,
                held_out_loss=float("nan") if number == 2 else 6.25,
                bytes=10,
                manifest_sha256=_manifest(directory, name, {"step": 3 * number}),
                seconds=0.25,
            )
        )

    if finished:
        ledger.append(Finished(attempt=1, step=6))
    return directory


def _cells(output: str, name: str) -> list[str]:
    return next(line for line in output.splitlines() if line.startswith(name)).split()


def test_each_checkpoint_is_a_row_with_its_numbers(tmp_path: Path) -> None:
    run = _run(tmp_path / "demo")
    done = _show(str(run))
    assert done.returncode == 0 and done.stderr == ""
    folder = run / "checkpoints"
    assert done.stdout.startswith("demo: finished, 1 start\n")
    assert _cells(done.stdout, "ckpt_000")[:4] == ["ckpt_000", "0", "-", "0"]

    expected = [
        "ckpt_001",
        "1",
        "chunk_004",
        "3",
        "3,000",
        "6.0000",
        "6.2500",
        "1.5",
        "0.2",
        f"{folder}/ckpt_001",
    ]

    assert _cells(done.stdout, "ckpt_001") == expected
    assert _cells(done.stdout, "ckpt_002")[2:7] == ["chunk_000", "6", "6,000", "3.0000", "nan"]
    assert (
        "8 events" not in done.stdout
        and f"{run}/ledger.jsonl" in done.stdout
        and "6 events, hash" in done.stdout
    )
    assert "wandb" not in done.stdout


def test_several_runs_are_shown_one_after_the_other(tmp_path: Path) -> None:
    done = _show(str(_run(tmp_path / "one")), str(_run(tmp_path / "two", finished=False)))
    assert done.returncode == 0
    assert done.stdout.index("one: finished") < done.stdout.index("two: not finished, 1 start")


def test_how_a_run_ended_is_said(tmp_path: Path) -> None:
    run = _run(tmp_path / "demo", finished=False)
    ledger = Ledger(run / "ledger.jsonl")
    ledger.append(Stopped(attempt=1, reason="SIGTERM", step=6))
    assert "demo: stopped at step 6 (SIGTERM), 1 start\n" in _show(str(run)).stdout
    ledger.append(event(Started, attempt=2))
    assert "demo: not finished, 2 starts\n" in _show(str(run)).stdout


def test_missing_changed_and_unrecorded_checkpoints_are_marked(tmp_path: Path) -> None:
    run = _run(tmp_path / "demo")
    shutil.rmtree(run / "checkpoints" / "ckpt_001")
    (run / "checkpoints" / "ckpt_002" / "manifest.json").write_text("{}")
    _manifest(run, "ckpt_003", {"step": 9})
    _manifest(run, "ckpt_004.tmp", {"step": 12})
    marks = {
        line.split()[0]: line
        for line in _show(str(run)).stdout.splitlines()
        if line.startswith("ckpt_")
    }
    assert marks["ckpt_001"].endswith("(not on the disk, and the ledger does not say why)")
    assert marks["ckpt_002"].endswith("(MANIFEST CHANGED)")
    assert marks["ckpt_003"].endswith("(not in the ledger)") and marks["ckpt_003"].split()[3] == "9"
    assert "ckpt_004.tmp" not in marks, "a half-written checkpoint is none"


def test_a_run_without_checkpoints_is_no_mistake(tmp_path: Path) -> None:
    Ledger(tmp_path / "demo" / "ledger.jsonl").append(event(Started, attempt=1))
    done = _show(str(tmp_path / "demo"))
    assert done.returncode == 0 and "no checkpoint yet" in done.stdout


@pytest.mark.parametrize(
    "fault", ["missing", "no ledger", "empty", "tampered", "bad metrics", "bad manifest", "a file"]
)
def test_a_missing_or_broken_run_is_one_line_and_exit_2(tmp_path: Path, fault: str) -> None:
    run = _run(tmp_path / "demo")
    good = _run(tmp_path / "good")

    match fault:
        case "missing":
            shutil.rmtree(run)
        case "no ledger":
            (run / "ledger.jsonl").unlink()
        case "empty":
            (run / "ledger.jsonl").write_text("")
        case "tampered":
            text = (run / "ledger.jsonl").read_text()
            (run / "ledger.jsonl").write_text(text.replace("chunk_004", "chunk_005"))
        case "bad metrics":
            (run / "metrics.jsonl").write_text("{\n")
        case "bad manifest":
            (run / "checkpoints" / "ckpt_001" / "manifest.json").write_text("{")
        case "a file":
            shutil.rmtree(run)
            run.touch()

    done = _show(str(good), str(run))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and str(run) in done.stderr


def test_it_needs_neither_torch_nor_an_installed_package(tmp_path: Path) -> None:
    run = _run(tmp_path / "demo")
    code = (
        f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = {str(ROOT / 'tools')!r}\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done: print('left', done.code, 'torch' in sys.modules, 'numpy' in "
        "sys.modules)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "tools" / "show_run.py"), str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd="/", timeout=HANG_SECONDS, check=True
    )
    assert done.stdout.splitlines()[-1] == "left 0 False False"
