"""Import path of this checkout, and what the command lines of all tools share.

- A tool is a script: only its own folder is on the import path. Importing this module puts the
  checkout there, so a tool works from a fresh clone and never uses another installed k2train.
- Imported before everything of the checkout; isort is told so in `pyproject.toml`.
- Ctrl-C while a tool imports ends it at once, in one line (`k2train.early_signals`).
- A tool reads and writes names and text in UTF-8, whatever the locale: a corpus has file names of
  every language, and they are part of the data.

Alternatives considered:
- Refusing such a locale: cluster jobs get `LC_ALL=C` from schedulers, not from their users.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k2train import command_line, early_signals
from k2train.command_line import Parser, positive

__all__ = ["Parser", "command", "positive"]

_main = getattr(sys.modules.get("__main__"), "__file__", None)
if _main and Path(_main).resolve().parent == Path(__file__).resolve().parent:
    early_signals.end_at_interrupt()


def command(main: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Turn `main(arguments)` into a command, as `k2train.command_line`; run in UTF-8."""
    run = command_line.command(main)

    @functools.wraps(main)
    def in_utf8(arguments: Sequence[str] | None = None) -> int:
        if arguments is None and sys.getfilesystemencoding() != "utf-8":
            # Again from the start: the encoding of a process is fixed. Its workers inherit it.
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
        # From here on Ctrl-C may have something to clean up.
        early_signals.take()
        return run(arguments)

    return in_utf8
