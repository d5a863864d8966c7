"""Console progress: one live line on a terminal, plain lines in a log, from the metrics rows.

- The time left is the median of recent steps times the steps left, plus the median pause at the end
  of a chunk (checkpoint, held-out loss) times the chunks left. Until the first such pause is
  measured, a `+` follows the estimate.
- Progress must never end a run: a closed pipe or terminal only silences the console.

Alternatives considered:
- A progress-bar library: it estimates the time left from the mean of all steps, ignores the pauses
  between chunks, and fills a log file with control characters.
"""

import math
import os
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import TextIO

from k2train.record.metrics import StepRecord
from k2train.text import duration

FIRST_LINES = 10
FEW_STEPS = 20
LINE_SECONDS = 5.0
RECENT_STEPS = 50
WIDE_COLUMNS = 110


class Console:
    """Progress of one stage on `stream`, for one rank.

    - `total_steps` and `total_chunks` count the whole stage.
    - A record's `step` counts the updates done in the stage (1 after the first).
    - `chunk_ends` holds for each chunk the step after which it is consumed. By default, chunks
      count as equally long.
    """

    def __init__(
        self,
        stream: TextIO,
        name: str,
        total_steps: int,
        total_chunks: int,
        chunk_ends: Sequence[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if chunk_ends is None:
            # Ceiling division: the last chunk ends exactly at the last step.
            chunk_ends = [
                -(-total_steps * (index + 1) // total_chunks) for index in range(total_chunks)
            ]

        assert len(chunk_ends) == total_chunks, (
            f"{len(chunk_ends)} chunk ends for {total_chunks} chunks"
        )
        self._stream = stream
        self._name = name
        self._total_steps = total_steps
        self._chunk_ends = list(chunk_ends)
        self._clock = clock
        self._is_live = _is_terminal(stream)
        self._drawn = ""
        self._is_silent = False
        self._steps_seen = 0
        self._last_line = -math.inf
        self._progress_shown: float | None = None
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._pauses: deque[float] = deque(maxlen=RECENT_STEPS)
        self._pause_began: float | None = None

    def step(self, record: StepRecord) -> None:
        """Show a finished step."""
        now = self._clock()
        self._progress_shown = None
        self._measure(record, now)
        if self._is_live:
            self._draw(self._fit_to_terminal(record))
        elif self._is_line_due(record, now):
            self._last_line = now
            self._write(self._text(record) + "\n")

    def info(self, text: str) -> None:
        """Print a permanent line: above the live line on a terminal, in sequence in a log."""
        if not self._is_live:
            self._write(f"{self._name} {text}\n")
            return
        drawn = self._drawn
        self._write(f"\r\x1b[K{text}\n")
        self._drawn = ""
        if drawn:
            self._draw(drawn)

    def progress(self, text: str) -> None:
        """Show what goes on between steps: a live line, or now and then a line in a log.

        Short work leaves no line in a log. "" ends it, and clears the live line.
        """
        now = self._clock()
        if self._is_live:
            if text:
                self._draw(f"{self._name} {text}"[: _columns(self._stream) - 1])
            elif self._progress_shown is not None:
                self._write("\r\x1b[K")
                self._drawn = ""
        elif text and self._progress_shown is not None:
            if now - self._progress_shown < LINE_SECONDS:
                return
            self._write(f"{self._name} {text}\n")
        # The first line of a log comes some seconds after the begin.
        self._progress_shown = now if text else None

    def close(self) -> None:
        """Keep the last live line and move the cursor to a new line. Idempotent."""
        if self._drawn:
            self._write("\n")
        self._drawn = ""

    def seconds_left(self, step: int) -> float | None:
        """Estimated seconds to the end of the stage; None before the first step."""
        if not self._step_seconds:
            return None
        # The first step after a start also warms caches up, so it predicts little.
        recent = list(self._step_seconds)
        typical = recent[1:] if self._steps_seen == len(recent) > 1 else recent
        # When the current step ends a chunk, its pause is still to come.
        chunks_left = len(self._chunk_ends) - bisect_left(self._chunk_ends, step)
        pauses = median(self._pauses) * chunks_left if self._pauses else 0.0
        return median(typical) * max(0, self._total_steps - step) + pauses

    def _measure(self, record: StepRecord, now: float) -> None:
        seconds = record.seconds
        if self._pause_began is not None:
            # The time between two steps, minus the second step itself, is the pause between their
            # chunks.
            self._pauses.append(max(0.0, now - self._pause_began - seconds))
        self._pause_began = now if record.step in self._chunk_ends else None
        self._step_seconds.append(seconds)
        self._steps_seen += 1

    def _is_line_due(self, record: StepRecord, now: float) -> bool:
        return (
            self._steps_seen <= FIRST_LINES
            or self._total_steps <= FEW_STEPS
            or now - self._last_line >= LINE_SECONDS
            or record.step in self._chunk_ends
            or record.step >= self._total_steps
            or not math.isfinite(record.loss)
        )

    def _text(self, record: StepRecord, bar_cells: int = 0, leave_out: Sequence[str] = ()) -> str:
        step = record.step
        # At the chunk's end, `step` is the last of its chunk, not the first of the next.
        chunk = min(bisect_left(self._chunk_ends, step) + 1, len(self._chunk_ends))
        left = self.seconds_left(step)
        unmeasured = "" if self._pauses else "+"
        position = f"chunk {chunk}/{len(self._chunk_ends)} step {step}/{self._total_steps}"
        parts = {
            "position": f"{self._name} {position}",
            "bar": self._bar(step, chunk, bar_cells) if bar_cells else "",
            "loss": f"loss {record.loss:.4f}",
            "grad_norm": f"grad_norm {record.grad_norm:.3g}",
            "lr": f"lr {record.lr:.3g}",
            "speed": f"{record.tokens_per_second:.0f} tok/s",
            "seconds": f"{record.seconds:.2f} s",
            "left": "left ?" if left is None else f"left {duration(left)}{unmeasured}",
        }

        return " ".join(text for key, text in parts.items() if text and key not in leave_out)

    def _bar(self, step: int, chunk: int, cells: int) -> str:
        """Progress bar: `#` for consumed chunks, `=` for the finished part of the current one."""
        before = 0 if chunk == 1 else self._chunk_ends[chunk - 2]
        consumed = step if step in self._chunk_ends else before
        solid = cells * consumed // self._total_steps
        done = min(cells, cells * step // self._total_steps)
        return "[" + "#" * solid + "=" * (done - solid) + "." * (cells - done) + "]"

    def _fit_to_terminal(self, record: StepRecord) -> str:
        """Longest text that fits the terminal. A wrapped line cannot be redrawn in place."""
        columns = _columns(self._stream) - 1
        leave_out: list[str] = []
        # Leave out one more part at a time, the least important first.
        for key in ("", "seconds", "lr", "grad_norm", "bar"):
            leave_out.append(key)
            text = self._text(record, 20 if columns >= WIDE_COLUMNS else 10, leave_out)
            if len(text) <= columns:
                return text
        return text[:columns]

    def _draw(self, text: str) -> None:
        self._write(f"\r{text}\x1b[K")
        self._drawn = text

    def _write(self, text: str) -> None:
        if self._is_silent:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._is_silent = True


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:
        return False


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
