"""`tools/bench_profile.py`: the table of a step's time, and errors reported before a process
starts.
"""

import json
from pathlib import Path

import pytest

from tests.support.command_line import load_tool
from tests.support.lanes import lanes

tool = load_tool("bench_profile")

TINY = [
    "--hidden",
    "32",
    "--ffn",
    "48",
    "--layers",
    "2",
    "--heads",
    "4",
    "--vocab",
    "64",
    "--length",
    "16",
]
TINY += ["--micro", "2", "--sequences", "4", "--steps", "1"]


@pytest.mark.parametrize(*lanes("processes", [1, 2], lambda count: count == 2))
def test_a_profile_of_a_tiny_work(
    processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a scope that no longer fits the engine, and waiting for others that is called
    Python.
    """
    out = tmp_path / "out.json"
    assert tool.main([*TINY, "--processes", str(processes), "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text()).values()
    spent = found["seconds"]
    for name in ("products", "attention", "loss", "elementwise", "optimizer"):
        assert spent[name] > 0, f"nothing counted as {name}"
    assert (spent["communication"] > 0) == (processes > 1)
    printed = capsys.readouterr().out
    assert "| **a step without the profiler** |" in printed
    assert "asked for: hidden 32, 2 layers, 16 x 2" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "30", "--heads", "4"], "model.hidden_size"),
        (["--kernel", "recompute"], "must be KEY=VALUE"),
        (["--kernel", "recompute=some"], "recompute"),
        (["--threads", "many"], "--threads"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback of a process for a mistake that is known before."""
    with pytest.raises(SystemExit) as left:
        tool.main(arguments)
    output = capsys.readouterr().err
    assert left.value.code == 2
    assert message in output and len(output.splitlines()) == 1


def test_a_process_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an empty table and exit code 0."""
    monkeypatch.setattr(
        tool, "command_of", lambda *_, **__: ["sh", "-c", "echo no such thing; exit 3"]
    )
    assert tool.main(TINY) == 1
    assert "exit code 3: no such thing" in capsys.readouterr().err
