"""All commands of the project alike: an unknown option, no arguments, a reader that has gone.

Would catch a command with a parser of its own, one that prints usage before the sentence, and one
that ends with a traceback when it is piped into `head`.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.command_line import TOOL_NAMES, load_tool

MODULES = ("k2train", "k2train.launch", "k2train.train")
COMMANDS = (*MODULES, *TOOL_NAMES)
NEED_NOTHING = {
    "bench_checkpoint",
    "bench_data",
    "bench_exact",
    "bench_growth",
    "bench_profile",
    "bench_schedules",
    "bench_spikes",
    "bench_watch",
    "config_reference",
    "doctor",
    "fault_run",
    "gpu_check",
    "mutation_check",
    "mutation_draw",
}
"""Commands that do their usual work without arguments."""


def main_of(name: str) -> Callable[..., Any]:
    module = importlib.import_module(f"{name}.__main__") if name in MODULES else load_tool(name)
    main: Callable[..., Any] = module.main
    return main


def one_line(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code = main_of(name)(arguments)
    except SystemExit as end:
        code = end.code
    out, error = capsys.readouterr()
    assert code == 2 and out == "" and error.count("\n") == 1, (out, error)
    return error


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = one_line(name, ["--no-such-option"], capsys)
    assert "no-such-option" in error or "required" in error
    assert error.endswith("; see --help\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_usage_has_a_line_of_its_own(name: str) -> None:
    """Catches a docstring whose commands were wrapped like a paragraph: nobody can copy them."""
    module = sys.modules[main_of(name).__module__]
    for line in (module.__doc__ or "").splitlines():
        if line.startswith("    ") and (call := re.search(r"\bpython (tools/|-m k2train)", line)):
            assert call.start() == 4, line


@pytest.mark.parametrize("name", sorted({*COMMANDS} - NEED_NOTHING))
def test_no_arguments_are_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = one_line(name, [], capsys)
    assert "required" in error or "give" in error, error


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stdout whose reader has gone."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w", encoding="utf-8", closefd=False) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield
        monkeypatch.undo()
    os.close(write_end)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_has_gone_is_no_error(
    name: str, gone: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main_of(name)(["--help"])
    assert not end.value.code and capfd.readouterr().err == ""


def test_explain_into_head(gone: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches the BrokenPipeError of `--explain | head -1`."""
    code = main_of("k2train.train")(["configs/demo/stage1.yaml", "--explain"])
    error = capfd.readouterr().err
    assert code == 0 and "Broken" not in error and "Traceback" not in error
