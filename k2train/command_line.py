"""Command lines that behave alike: errors on one line, exit codes, Ctrl-C, output into `| head`.

    @command
    def main(arguments: Sequence[str]) -> int:
        options = Parser(prog="plan", description="...").parse_args(arguments)

- A mistake in the arguments or a `UserError` is printed on stderr, and the exit code is 2. An
  `UnavailableError` is printed, too, with exit code 1.
- Once the reader of the output has gone, the command goes on silently to its own exit code: a
  check that is piped into `head` has the same result.
- A name that the locale cannot spell is one line, too, with the setting that can.
- Ctrl-C is one line and exit code 130. Any other exception is a bug and keeps its traceback.

Alternatives considered:
- argparse's own errors: two to twenty lines of usage hide the sentence.
- Ending at the first broken pipe: the exit code would be that of the reader's patience.
"""

import argparse
import difflib
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO, cast

from k2train.commands import started_as
from k2train.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    UnavailableError,
    UserError,
)

UNKNOWN = "unrecognized arguments"
REQUIRED = "the following arguments are required"
"""Begins of argparse's errors that an option with a wrong name leads to."""
INVALID = re.compile(r"invalid (\w+) value: ('.*'|\".*\")$", re.DOTALL)
KINDS = {"int": "a whole number", "float": "a number"}
"""What argparse calls by the name of a Python function."""


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error as one line, without the usage text."""

    _given: Sequence[str] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        own = started_as()
        if own and not self.prog.startswith(own):
            self.prog = own

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; keeps the arguments, for advice in an error."""
        self._given = [str(one) for one in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the error, with what was probably meant, and exit."""
        advice = self._advice() if message.startswith((UNKNOWN, REQUIRED)) else ""
        message = INVALID.sub(_kind_of_value, message)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}{advice}; see --help\n")

    def _advice(self) -> str:
        """Say what the first unknown option should have been; "" for none."""
        options = self._option_string_actions
        positionals = [action.dest for action in self._get_positional_actions()]
        before_dashes = (
            self._given[: self._given.index("--")] if "--" in self._given else self._given
        )
        for number, text in enumerate(before_dashes):
            name, equals, value = text.partition("=")
            if not name.startswith("--") or any(known.startswith(name) for known in options):
                continue
            key = name.lstrip("-")
            if "." in key and "overrides" in positionals:
                follows = (*before_dashes[number + 1 : number + 2], "VALUE")[0]
                given = value if equals else "VALUE" if follows.startswith("-") else follows
                return f"; write {key}={given}, without dashes"
            if key == "config" and "config" in positionals:
                return f"; write the config's name alone, without {name}"
            near = difflib.get_close_matches(name, options, 1)
            return f"; nearest to {name} is {near[0]}" if near else ""
        return ""


def _kind_of_value(found: re.Match[str]) -> str:
    """Say what a value must be in place of Python's name for it."""
    kind, value = found.groups()
    return f"must be {KINDS.get(kind, 'another value')}, not {value}"


def positive(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def command(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Turn `main(arguments)` into the whole command; without arguments it takes `sys.argv`."""

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        show_any_character()
        with readers_may_leave():
            try:
                return main(sys.argv[1:] if arguments is None else arguments)
            except UserError as error:
                print(error, file=sys.stderr)
                return EXIT_USAGE
            except UnavailableError as error:
                print(error, file=sys.stderr)
                return EXIT_FAILED
            except UnicodeEncodeError as error:
                if not (problem := locale_problem(error)):
                    raise
                print(problem, file=sys.stderr)
                return EXIT_USAGE
            except KeyboardInterrupt as interrupt:
                print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
                return EXIT_INTERRUPTED

    return run


def show_any_character() -> None:
    """Escape what stdout cannot show: documents and names contain any character.

    Bytes of stdin that are no text become lone surrogates in every locale, as they do in that of C:
    whoever reads the line refuses it, and goes on.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def locale_problem(error: UnicodeEncodeError) -> str:
    """Say that the locale cannot spell a name; "" where the locale is not the reason."""
    encoding = sys.getfilesystemencoding()
    escaped = any("\udc80" <= character <= "\udcff" for character in error.object)
    if encoding == "utf-8" and not escaped:
        return ""
    name = error.object.encode("ascii", "backslashreplace").decode()
    if encoding == "utf-8":
        return f"{name} is not UTF-8, so it cannot be written down: rename it"
    return (
        f"{name} cannot be spelled in the encoding of this locale ({encoding}): set PYTHONUTF8=1, "
        "or a UTF-8 locale such as LC_ALL=C.UTF-8"
    )


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Discard output to stdout and stderr whose reader has gone."""
    # Without a terminal or a file there may be no stream at all.
    out, err = (cast(TextIO, stream and _Output(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            # Not left to the interpreter's exit, which would report a broken pipe.
            for stream in filter(None, (out, err)):
                stream.flush()


class _Output:
    """Text stream that discards what is written once its reader has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._reader_may_leave():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._reader_may_leave():
            self._stream.flush()

    @contextmanager
    def _reader_may_leave(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What the stream still buffers goes there, too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
