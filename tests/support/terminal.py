"""A pseudo-terminal of a given width for tests, and all that was written to it.

- A terminal hands its output over in pieces, whenever it likes: `shown` reads up to a mark that it
  writes behind it, so that no verdict depends on how soon a piece comes.
"""

import fcntl
import os
import pty
import struct
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

MARK = b"\x00all\x00"


@dataclass(frozen=True)
class Terminal:
    """What a program writes to (`stream`), and the end from which it is read."""

    stream: TextIO
    outside: int

    def resize(self, columns: int, rows: int = 24) -> None:
        """Give it another size, in characters."""
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, size)

    def shown(self) -> str:
        """All that was written since the last call."""
        self.stream.flush()
        os.write(self.stream.fileno(), MARK)
        data = b""
        while not data.endswith(MARK):
            data += os.read(self.outside, 65536)
        return data.removesuffix(MARK).decode()


@contextmanager
def terminal_of(columns: int) -> Iterator[Terminal]:
    """A terminal of this size that changes no byte of what is written."""
    outside, inside = pty.openpty()
    try:
        tty.setraw(inside)
        with os.fdopen(inside, "w") as stream:
            terminal = Terminal(stream, outside)
            terminal.resize(columns)
            yield terminal
    finally:
        os.close(outside)
