"""The `k2train` command: what it starts, with which arguments and exit code, and its mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import k2train
from k2train.__main__ import main
from k2train.commands import COMMANDS
from tests.support.command_line import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "k2train", *arguments],
        cwd=ROOT,
        # The folder of the tools is not in it.
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    shown = capsys.readouterr().out
    assert not end.value.code
    for name, command in COMMANDS.items():
        assert f"  {name} " in shown and command.summary in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"k2train {k2train.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["shwo"], "k2train: there is no command shwo; nearest is show; see --help\n"),
        (["zzzzzz"], "k2train: there is no command zzzzzz; see --help\n"),
        (["a.yaml"], "k2train: a.yaml is a config; write k2train train a.yaml; see --help\n"),
    ],
)
def test_a_wrong_command_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and capsys.readouterr().err == line


def test_a_tool_runs_and_names_itself() -> None:
    """Catches a tool that is started with the command's own name among its arguments, and one that
    cannot import what lies beside it.
    """
    done = run("plan", "configs/demo/stage1.yaml", "--world", "2", "parallel.pipeline=2")
    assert done.returncode == 0 and "world 2 = pipeline 2" in done.stdout, done.stderr
    wrong = run("find-spikes", "--no-such-option")
    assert wrong.returncode == 2 and wrong.stderr.startswith("k2train find-spikes: ")


def test_the_trainer_runs_with_its_exit_code(tmp_path: Path) -> None:
    """Catches a module that is imported and not run, and an exit code that is lost."""
    done = run("train", "configs/demo/stage1.yaml", "lr.peak=1e-3", "--explain")
    assert done.returncode == 0 and "lr.peak" in done.stdout
    missing = run("train", "configs/demo/stage1.yaml", f"data.manifest={tmp_path}/none")
    assert missing.returncode == 2
    assert missing.stderr.endswith("; k2train prepare-data makes it\n"), missing.stderr
