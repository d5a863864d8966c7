"""The launcher's exit code: what a batch script decides on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corpus import ROOT, config_tree, environment, make_corpus, write_yaml
from k2train.launch import signalled, verdict
from k2train.parallel.environment import order_kernels

OPTIONS = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("codes", "expected"),
    (
        ({0: 75, 1: 75}, 75),
        ({0: 75, 1: -15, 2: -15}, 75),
        ({0: 2, 1: -15}, 2),
        ({0: 2, 1: 75}, 2),
        ({0: 1, 1: 2}, 1),
        ({1: -9, 0: -15}, 1),
        ({0: -15, 1: -15}, 1),
        ({0: 75, 1: -9}, 1),
    ),
)
def test_verdict(codes: dict[int, int], expected: int) -> None:
    """A job that saved and stopped is started again, one with a mistake is not; a killed process is neither."""
    assert verdict(codes) == expected


def test_one_bad_process_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    verdict({0: -15, 3: -9})
    assert capfd.readouterr().err == "process 3 ended with signal 9\n"


@pytest.mark.parametrize(
    ("codes", "expected"),
    (({0: 75, 1: 75}, 75), ({0: 0, 1: 0}, 0), ({0: 75, 1: None}, 1), ({0: 75, 1: 1}, 1), ({}, 1)),
)
def test_verdict_after_a_signal(codes: dict[int, int | None], expected: int) -> None:
    """75 says that everything is saved: one process that was killed while saving makes it a lie."""
    assert signalled(codes) == expected


def test_kernels_are_begun_in_order_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a setting of the user's that is overwritten, and a default that never reaches the processes."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    order_kernels()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    order_kernels()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def launch(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "k2train.launch", *OPTIONS, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        cwd=ROOT,
    )


def test_real_processes(tmp_path: Path) -> None:
    """Through the real torchrun: the processes' own code comes out, without a traceback."""
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(75)\n")
    process = launch(tmp_path / "leaves.py")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in text


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "data")
    tree = config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "run", parallel__tensor=2)
    return write_yaml(tmp_path / "run.yaml", tree)


def test_a_mistake_is_told_once_and_ends_with_2(config: Path) -> None:
    """A line a process, or a code that a batch script takes for a crash and tries again."""
    process = launch("-m", "k2train.train", config, "modle.num_heads=3")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert text.count("unknown key") == 1
    assert "Traceback" not in text


@pytest.mark.slow
def test_asked_to_stop_all_processes_save_and_go_on(config: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher alone: every process finishes the step, one checkpoint is written, the code is 75."""
    run = tmp_path / "runs" / "run"
    process = launch("-m", "k2train.train", config)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75, text
    stopped = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert stopped[-1]["event"] == "stopped" and stopped[-1]["reason"] == "SIGTERM"
    done = stopped[-1]["step"]
    assert metrics.read_text().count("\n") == done < 20
    assert any(
        json.loads((path / "manifest.json").read_text())["step"] == done for path in (run / "checkpoints").iterdir()
    )
    again = launch("-m", "k2train.train", config)
    text, _ = again.communicate(timeout=90)
    assert again.returncode == 0, text
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 21)), "a step was lost or done twice"
