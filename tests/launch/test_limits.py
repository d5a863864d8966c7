"""Limit of open files: raised, and refused in one line before any process meets another."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from k2train.errors import EXIT_USAGE, RunError
from k2train.launch import limits
from k2train.launch.limits import raise_open_files, require_open_files
from k2train.train import __main__ as command_line
from tests.support.tiny_corpus import config_tree, make_corpus, write_yaml


def test_the_soft_limit_becomes_the_hard_one() -> None:
    """Catches a job of 500 processes that fails at 1,024 files where 500,000 are allowed."""
    program = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (64, 256));"
        "from k2train.launch.limits import raise_open_files;"
        "print(raise_open_files(), *r.getrlimit(r.RLIMIT_NOFILE))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["256", "256", "256"]


def test_a_limit_that_may_not_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start that fails because a system does not grant the hard limit it names."""

    def refuse(*_: Any) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(limits.resource, "setrlimit", refuse)
    assert raise_open_files() == 1024
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert raise_open_files() is None
    require_open_files(10**9, 10**6)


def test_a_hard_limit_that_is_named_and_not_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a world that is refused at 256 files where 4,096 would be granted."""
    soft = [256]

    def grant(_: int, pair: tuple[int, int]) -> None:
        if not 0 <= pair[0] <= 10_240:
            raise ValueError("current limit exceeds maximum limit")
        soft[0] = pair[0]

    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (soft[0], resource.RLIM_INFINITY))
    monkeypatch.setattr(limits.resource, "setrlimit", grant)
    require_open_files(521, 1)
    assert soft == [521]
    assert raise_open_files() == limits.USUAL
    with pytest.raises(RunError, match="up to 20000 open files"):
        require_open_files(20_000, 5000)


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message that names no number and no way out."""
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (4096, 4096))
    require_open_files(4096, 1000)
    with pytest.raises(
        RunError, match=r"(?s)world of 1100.*4097.*is 4096.*LimitNOFILE.*srun --pro"
    ):
        require_open_files(4097, 1100)


def test_a_start_is_refused_before_it_loads_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a limit that is looked at after the processes have met."""
    make_corpus(tmp_path / "data", 2)
    tree = config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "run")
    monkeypatch.setattr(limits, "raise_open_files", lambda needed: 100)

    def load(name: str) -> Any:
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(command_line.importlib, "import_module", load)
    assert command_line.main([str(write_yaml(tmp_path / "c.yaml", tree))]) == EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "the limit here is 100" in line
    # Nothing is left of the start.
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("*.*"))
