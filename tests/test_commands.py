"""Table of commands: a tool that no command starts, a command without a program, a wrong name."""

import ast
import importlib.util
from pathlib import Path

import pytest

from k2train import commands
from k2train.commands import COMMANDS, GROUPS, program_text, start_as, started_as
from tests.support.command_line import TOOL_NAMES

ROOT = Path(__file__).resolve().parents[1]


def developers_tools() -> tuple[str, ...]:
    """Begins of the names that `setup.py` leaves out of a wheel."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (found,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DEVELOPERS_MODULES"
    )
    return tuple(found)


def test_each_tool_is_a_command_or_a_developers() -> None:
    """Catches a new tool that an installed user cannot start: it needs a line in the table."""
    started = {command.program for command in COMMANDS.values() if "." not in command.program}
    for_users = {name for name in TOOL_NAMES if not name.startswith(developers_tools())}
    assert for_users == started


def test_each_module_is_there() -> None:
    for command in COMMANDS.values():
        if "." in command.program:
            assert importlib.util.find_spec(f"{command.program}.__main__") is not None


def test_names_are_unique_and_said_in_a_few_words() -> None:
    """Catches a command that hides another one, and a line that is wider than a terminal."""
    assert len(COMMANDS) == sum(map(len, GROUPS.values()))
    assert len({command.program for command in COMMANDS.values()}) == len(COMMANDS)
    width = max(map(len, COMMANDS))
    assert max(width + len(command.summary) for command in COMMANDS.values()) <= 76


def test_a_program_is_named_as_it_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a message that points to a file which a wheel does not have."""
    assert program_text("prepare_data") == "python tools/prepare_data.py"
    assert program_text("k2train.train") == "python -m k2train.train"
    assert started_as() == ""

    (tmp_path / "k2train_tools").mkdir()
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "k2train" / "commands.py"))
    assert program_text("prepare_data") == "k2train prepare-data"
    assert program_text("k2train.train") == "k2train train"


def test_a_started_command_names_the_others_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `k2train train` that tells its user to start a script."""
    monkeypatch.setattr(commands, "_started", [])
    start_as("train")
    assert started_as() == "k2train train"
    assert program_text("show_run") == "k2train show"
