"""Command lines that behave alike: errors on one line, exit codes, Ctrl-C, output into `| head`.

    @command
    def main(arguments: Sequence[str]) -> int:
        options = Parser(prog="plan", description="...").parse_args(arguments)

- A mistake in the arguments or a `UserError` is printed on stderr, and the exit code is 2. An
  `UnavailableError` is printed, too, with exit code 1.
- Once the reader of the output has gone, the command goes on silently to its own exit code: a
  check that is piped into `head` has the same result.
- Ctrl-C is one line and exit code 130. Any other exception is a bug and keeps its traceback.

Alternatives considered:
- argparse's own errors: two to twenty lines of usage hide the sentence.
- Ending at the first broken pipe: the exit code would be that of the reader's patience.
"""

import argparse
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO, cast

from k2train.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    UnavailableError,
    UserError,
)


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error as one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see --help\n")


def positive(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def command(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Turn `main(arguments)` into the whole command; without arguments it takes `sys.argv`."""

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Documents and names contain any character; one that cannot be shown is escaped.
            sys.stdout.reconfigure(errors="backslashreplace")
        with readers_may_leave():
            try:
                return main(sys.argv[1:] if arguments is None else arguments)
            except UserError as error:
                print(error, file=sys.stderr)
                return EXIT_USAGE
            except UnavailableError as error:
                print(error, file=sys.stderr)
                return EXIT_FAILED
            except KeyboardInterrupt as interrupt:
                print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
                return EXIT_INTERRUPTED

    return run


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
