"""Command line of the dry run: mistakes that need no torch."""

import sys
from pathlib import Path

import pytest

from tests.support.command_line import load_tool

DEMO = str(Path(__file__).resolve().parents[2] / "configs" / "demo" / "stage1.yaml")
tool = load_tool("dry_run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["--rank", "4", "--world", "4"], "--rank (4) must be below --world (4)"),
        (["--rank", "-1"], "must be a whole number from 0, not '-1'"),
        (["--rank", "first"], "must be a whole number from 0, not 'first'"),
        (["--rank", "0", "--all-ranks"], "one of the two"),
        (["--world", "3"], "batch.global_sequences (16)"),
    ),
)
def test_a_mistake_is_one_line_before_the_step(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a rank that is found missing after seconds of imports, and one that is ignored."""
    # Importing it would fail the test, as it would load torch.
    monkeypatch.setitem(sys.modules, "k2train.train.dry_run", None)
    monkeypatch.setitem(sys.modules, "k2train.train.dry_peers", None)
    try:
        code = tool.main([DEMO, *arguments])
    except SystemExit as left:
        code = int(str(left.code))
    errors = capsys.readouterr().err
    assert code == 2 and words in errors and errors.count("\n") == 1
