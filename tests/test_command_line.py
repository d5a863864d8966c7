"""Command lines: one-line errors, exit codes, readers that leave, names no terminal can show."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from k2train.command_line import Parser, command, positive
from k2train.errors import ConfigError
from tests.support.command_line import HANG_SECONDS

PROGRAM = """
import os, sys
from collections.abc import Sequence
from k2train.command_line import command
from k2train.errors import UserError

@command
def main(arguments: Sequence[str]) -> int:
    for number in range(50_000):
        print("line", number, *arguments)
        print("also", number, file=sys.stderr)
    return 3

sys.exit(main())
"""


def outcome(main: object, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    code = command(main)(["a"])  # type: ignore[arg-type]
    return code, capsys.readouterr().err


def test_a_user_error_is_its_lines_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback for a mistake, and a bug that is taken for one."""

    def mistaken(arguments: object) -> int:
        raise ConfigError("a.yaml:1: no such key\na.yaml:2: nor this")

    def broken(arguments: object) -> int:
        raise ValueError("a bug")

    assert outcome(mistaken, capsys) == (2, "a.yaml:1: no such key\na.yaml:2: nor this\n")
    with pytest.raises(ValueError, match="a bug"):
        outcome(broken, capsys)


@pytest.mark.parametrize(
    ("hint", "said"),
    [([], "interrupted\n"), (["start again"], "interrupted; start again\n")],
)
def test_ctrl_c_is_one_line(hint: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(arguments: object) -> int:
        raise KeyboardInterrupt(*hint)

    assert outcome(stopped, capsys) == (130, said)


def test_arguments_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", "x", "y"])
    assert command(len)() == 2
    assert command(len)(["z"]) == 1


def test_a_mistake_in_the_arguments_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches the usage text in front of the sentence, and the error of a subcommand."""
    parser = Parser(prog="tool")
    parser.add_subparsers(required=True).add_parser("go").add_argument("--n", type=positive)
    for given, said in (
        ([], "tool: the following arguments are required"),
        (["go", "--n", "0"], "tool go: argument --n: must be a whole number of at least 1, not"),
        (["go", "--n", "²"], "tool go: argument --n: must be a whole number of at least 1, not"),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(given)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith(said) and error.count("\n") == 1
        assert error.endswith("; see --help\n")
    assert parser.parse_args(["go", "--n", "12"]).n == 12


@pytest.mark.parametrize(
    ("given", "advice"),
    (
        (["c.yaml", "--lr.peak=1e-3"], "; write lr.peak=1e-3, without dashes"),
        (["c.yaml", "--lr.peak", "1e-3"], "; write lr.peak=1e-3, without dashes"),
        (["c.yaml", "--lr.peak"], "; write lr.peak=VALUE, without dashes"),
        (["--config", "c.yaml"], "; write the config's name alone, without --config"),
        (["--config=c.yaml"], "; write the config's name alone, without --config"),
        (["c.yaml", "--wrold", "4"], "; nearest to --wrold is --world"),
        (["c.yaml", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([], "required: CONFIG.yaml"),
    ),
)
def test_an_unknown_option_is_told_what_was_meant(
    given: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches `unrecognized arguments` for the habits of other programs."""
    parser = Parser(prog="tool")
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="dotted.key=value")
    parser.add_argument("--world", type=positive)
    with pytest.raises(SystemExit):
        parser.parse_intermixed_args(given)
    assert capsys.readouterr().err.endswith(f"{advice}; see --help\n")


@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_a_reader_that_leaves_changes_nothing(closed: str) -> None:
    """Catches a broken pipe told as an error, and an exit code that depends on `| head`."""
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=write_end,
        stderr=write_end if closed == "both" else subprocess.PIPE,
    )
    os.close(write_end)
    assert os.read(read_end, 4) in (b"line", b"also")
    os.close(read_end)
    _, error = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 3
    if closed == "stdout":
        assert error.count(b"\n") == 50_000 and b"Broken" not in error


def test_a_character_that_cannot_be_shown_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a UnicodeEncodeError half-way through a table of documents."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))

    @command
    def main(arguments: object) -> int:
        print("caf\u00e9")
        return 0

    assert main([]) == 0
    assert written.getvalue() == b"caf\\xe9\n"


SPELLS = """
import sys
from k2train.command_line import command
@command
def main(arguments):
    open("/nowhere/caf\\u00e9")
    return 0
sys.exit(main())
"""


@pytest.mark.parametrize("utf8", ("0", "1"))
def test_a_name_that_the_locale_cannot_spell(utf8: str) -> None:
    """Catches a traceback for a path of the config, and one line that hides another bug."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SPELLS],
        capture_output=True,
        text=True,
        env=environment,
        timeout=HANG_SECONDS,
    )
    if utf8 == "1":
        assert done.returncode == 1 and "FileNotFoundError" in done.stderr
        return
    assert done.returncode == 2 and done.stderr == (
        "/nowhere/caf\\xe9 cannot be spelled in the encoding of this locale (ascii): set "
        "PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8\n"
    )


def test_a_bug_in_an_encoding_keeps_its_traceback() -> None:
    def mistaken(arguments: object) -> int:
        return len("caf\u00e9".encode("ascii"))

    with pytest.raises(UnicodeEncodeError):
        command(mistaken)([])


def test_a_command_without_output_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failure where a service manager gives no stdout."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    @command
    def main(arguments: object) -> int:
        print("nobody hears this")
        return 5

    assert main([]) == 5


def test_stdin_that_is_no_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a conversation that ends with a traceback at a line pasted in another encoding."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\nb\n"), "utf-8"))
    found: list[str] = []

    def reading(arguments: object) -> int:
        found.extend(sys.stdin)
        return 0

    assert command(reading)([]) == 0
    assert found == ["\udcff\n", "b\n"]


def _of_ours(text: str) -> int:
    return int(text)


@pytest.mark.parametrize(
    ("kind", "message"),
    (
        (int, "argument --value: must be a whole number, not 'x'"),
        (float, "argument --value: must be a number, not 'x'"),
        (_of_ours, "argument --value: must be another value, not 'x'"),
    ),
)
def test_a_value_of_another_kind_is_told_in_words(
    kind: Callable[[str], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the name of a function of ours, `invalid _tokens value`, shown to a user."""
    parser = Parser(prog="tool")
    parser.add_argument("--value", type=kind)
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--value", "x"])
    errors = capsys.readouterr().err
    assert left.value.code == 2 and message in errors and "invalid" not in errors
