"""Command lines of the tools: all alike, and each from a checkout that is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import HANG_SECONDS, TOOLS, load_tool

NAMES = sorted(
    path.stem for path in TOOLS.glob("*.py") if path.stem not in ("command_line", "mutations")
)


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_is_none_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a tool with a parser of its own: usage, then the sentence."""
    with pytest.raises(SystemExit) as end:
        load_tool(name).main(["--no-such-option"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.endswith("; see --help\n")


def test_a_tool_uses_its_own_checkout(tmp_path: Path) -> None:
    """Catches a tool that works only where k2train is installed, or runs another one's code."""
    other = tmp_path / "k2train"
    other.mkdir()
    (other / "__init__.py").write_text("raise SystemExit('another k2train')")
    done = subprocess.run(
        [sys.executable, TOOLS / "plan.py", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0 and "CONFIG.yaml" in done.stdout, done.stderr
