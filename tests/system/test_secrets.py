"""Secrets: keys in the environment must not reach artefacts, logs or visible command lines."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from k2train.processes import descendants
from k2train.record.system_info import environment_facts, job_facts
from tests.support.command_line import HANG_SECONDS
from tests.support.tiny_corpus import (
    ROOT,
    cold_command,
    config_tree,
    environment,
    make_corpus,
    tree_of,
    write_yaml,
)

SECRET = "c4n4ry" + "0" * 34
NAMES = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "K2TRAIN_TEST_PASSWORD",
    "GITHUB_TOKEN",
    "SLURM_JWT",
)


def test_a_run_leaves_no_secret_anywhere(tmp_path: Path) -> None:
    """Searches the files, terminal output and command lines of a whole run with W&B offline
    and TensorBoard.

    Also the output of `--explain`.
    """
    pytest.importorskip("wandb")
    make_corpus(tmp_path / "data", chunks=1)
    tree = config_tree(
        tmp_path / "data" / "manifest.json",
        tmp_path / "runs",
        "run",
        wandb={"mode": "offline"},
        tracking={"tensorboard": True},
    )
    path = write_yaml(tmp_path / "run.yaml", tree)
    secrets = environment(**dict.fromkeys(NAMES, SECRET))
    explained = subprocess.run(
        cold_command([path, "--explain"]),
        env=secrets,
        cwd=ROOT,
        capture_output=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    running = subprocess.Popen(
        cold_command([path]),
        env=secrets,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines: set[bytes] = set()
    watcher = threading.Thread(target=_watch, args=(running, lines))
    watcher.start()
    said, _ = running.communicate(timeout=HANG_SECONDS)
    watcher.join()
    assert running.returncode == 0, said
    files = tree_of(tmp_path)
    assert any(name.endswith(".wandb") for name in files) and any(
        "ledger" in name for name in files
    )
    assert any(b"k2train.train" in line for line in lines)
    holders = [
        name for name, content in files.items() if SECRET.encode() in content or SECRET in name
    ]
    assert holders == [] and SECRET.encode() not in said + explained.stdout + explained.stderr
    assert [line for line in lines if SECRET.encode() in line] == []


def _watch(running: subprocess.Popen[bytes], lines: set[bytes]) -> None:
    while running.poll() is None:
        for pid in [running.pid, *descendants([running.pid])]:
            try:
                lines.add(Path(f"/proc/{pid}/cmdline").read_bytes())
            except OSError:
                continue
        time.sleep(0.05)


def test_the_facts_of_the_environment_hold_no_value_and_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, SECRET)
    facts = repr(environment_facts()) + repr(job_facts())
    assert SECRET not in facts
    for place in (str(Path.home()), sys.prefix, sys.executable, str(ROOT), os.getcwd()):
        assert place not in facts
