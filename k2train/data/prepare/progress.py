"""Progress display: a bar on a terminal, a few plain lines in a log.

- One object is passed down, so that library code reports progress without knowing where it is
  shown.
- Progress goes to stderr; stdout is for results.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import IO, TypeVar

from tqdm import tqdm

from k2train.text import counted

Item = TypeVar("Item")
QUIET_SECONDS = 5.0


class Progress:
    """Progress of phases on `stream`; shows nothing when `stream` is None."""

    def __init__(self, stream: IO[str] | None = sys.stderr) -> None:
        self.stream = stream

    def log(self, line: str) -> None:
        """Print one line."""
        if self.stream is not None:
            print(line, file=self.stream, flush=True)

    def track(
        self, label: str, items: Iterable[Item], unit: str, total: int | None = None
    ) -> Iterator[Item]:
        """Yield the items while showing progress; `unit` is the word for one of them.

        A bar on a terminal. Otherwise one line at the end, and one every few seconds before it.
        """
        if total is None and isinstance(items, Sized):
            total = len(items)
        if self.stream is None:
            yield from items
        elif self.stream.isatty():
            # A bar that is wider than the terminal would leave its remains behind.
            yield from tqdm(
                items,
                desc=label,
                total=total,
                unit=f" {unit if total == 1 else f'{unit}s'}",
                file=self.stream,
                dynamic_ncols=True,
            )
        else:
            yield from self._lines(label, items, total, unit)

    def _lines(
        self, label: str, items: Iterable[Item], total: int | None, unit: str
    ) -> Iterator[Item]:
        started = shown = time.monotonic()
        done = 0
        for item in items:
            yield item
            done += 1
            if time.monotonic() - shown > QUIET_SECONDS and done != total:
                shown = time.monotonic()
                of = f"{done} of {counted(total, unit)}" if total else counted(done, unit)
                self.log(f"{label}: {of}")
        self.log(f"{label}: {counted(done, unit)} in {time.monotonic() - started:.1f} s")
