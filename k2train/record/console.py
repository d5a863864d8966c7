"""Console: step lines that stay, a live line of progress on a terminal, messages with their time.

- A log file gets a line every `log.every_steps` steps, each with date and time. A terminal gets
  these lines, too, shortened to its width, above one live line: bar, per cent, elapsed and left.
- The time left is the median of recent steps times the steps left, plus the median pause at the end
  of a chunk (checkpoint, held-out loss) times the chunks left. Until the first such pause is
  measured, the estimate says `+ saves`.
- Progress must never end a run: a closed pipe or terminal only silences the console.

Alternatives considered:
- A progress-bar library: it estimates the time left from the mean of all steps, ignores the pauses
  between chunks, and fills a log file with control characters.
- A step line every few seconds: missing steps look like lost ones.
"""

import math
import os
import re
import textwrap
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import TextIO

from k2train.record.metrics import StepRecord
from k2train.record.step_line import StageFacts, fitting, step_parts, wrapped
from k2train.text import duration

PROGRESS_SECONDS = 5.0
"""Time between two lines of progress in a log."""
RECENT_STEPS = 50
WIDE_COLUMNS = 110
COLORS = {"dim": "2", "bold": "1", "red": "31", "green": "32", "yellow": "33", "blue": "34"}
"""Colour -> number of its escape sequence."""
LEAST_OF_LIVE = ("bar", "elapsed", "position", "name")
PROBLEM = re.compile(
    r"refused|damaged|skipped|^spike|^stopped:|cannot|is off|on purpose|are lost|far from usual"
)
"""Messages that are yellow where there is colour; nothing else depends on it."""
RESULT = re.compile(r"^(saved|finished) ")


@dataclass(frozen=True)
class Look:
    """How much is shown, and in which form: the section `log` of a config."""

    every_steps: int = 1
    color: str = "auto"
    detail: str = "normal"


class Console:
    """Progress of one stage on `stream`, for one rank.

    A record's `step` counts the updates done in the stage (1 after the first).
    """

    def __init__(
        self,
        stream: TextIO,
        stage: StageFacts,
        look: Look | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._stream, self._stage, self._look = stream, stage, look or Look()
        self._clock, self._now = clock, now
        terminal = _is_terminal(stream)
        self._is_quiet = self._look.detail == "quiet"
        self._is_verbose = self._look.detail == "verbose"
        self._is_terminal = terminal
        self._is_live = terminal and not self._is_quiet
        color = self._look.color
        self._has_color = color == "on" or (
            color == "auto" and terminal and not os.environ.get("NO_COLOR")
        )
        self._drawn = ""
        self._is_silent = False
        self._steps_seen = 0
        self._last_step: int | None = None
        self._progress_shown: float | None = None
        self._began = clock()
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._pauses: deque[float] = deque(maxlen=RECENT_STEPS)
        self._pause_began: float | None = None

    def step(self, record: StepRecord) -> None:
        """Show a finished step."""
        self._progress_shown = None
        self._measure(record, self._clock())
        if self._is_quiet:
            return
        if self._is_line_due(record):
            self._print(self._step_line(record))
        self._last_step = record.step
        if self._is_live:
            self._draw(self._live_line(record.step))

    def info(self, text: str) -> None:
        """Print a message that stays: above the live line on a terminal, in sequence in a log."""
        color = "yellow" if PROBLEM.search(text) else "green" if RESULT.search(text) else ""
        if not self._is_terminal:
            self._print(f"{self._stamp()} {self._stage.name} {self._paint(text, color)}")
            return
        stamp = self._stamp()
        lines = textwrap.wrap(
            text,
            max(20, _columns(self._stream) - 1 - len(stamp) - 1),
            # A path or a command stays in one piece.
            break_long_words=False,
            break_on_hyphens=False,
        )
        indent = "\n" + " " * (len(stamp) + 1)
        shown = indent.join(self._paint(line, color) for line in lines)
        self._print(f"{self._paint(stamp, 'dim')} {shown}")

    def progress(self, text: str, at_once: bool = False) -> None:
        """Show what goes on between steps: a live line, or now and then a line in a log.

        Short work leaves no line in a log, but with `at_once`, for work that cannot say how far it
        is. "" ends it: the live line is that of the last step again, or none.
        """
        if self._is_quiet:
            return
        now, last = self._clock(), self._progress_shown
        if self._is_live:
            if text:
                self._draw(f"{self._stage.name} {text}"[: _columns(self._stream) - 1])
            elif last is not None and self._last_step is not None:
                self._draw(self._live_line(self._last_step))
            elif last is not None:
                self._write("\r\x1b[K")
                self._drawn = ""
        elif text and (
            at_once or self._is_verbose or (last is not None and now - last >= PROGRESS_SECONDS)
        ):
            self._print(f"{self._stamp()} {self._stage.name} {text}")
        elif text and last is not None:
            return
        # The first line of a log comes some seconds after the begin.
        self._progress_shown = now if text else None

    def close(self) -> None:
        """Keep the last live line and move the cursor to a new line. Idempotent."""
        step = self._last_step
        if self._drawn and step is not None and step >= self._stage.total_steps:
            self._draw(self._live_line(step, ended=True))
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
        ends = self._stage.chunk_ends
        pauses = median(self._pauses) * (len(ends) - bisect_left(ends, step)) if self._pauses else 0
        return median(typical) * max(0, self._stage.total_steps - step) + pauses

    def _measure(self, record: StepRecord, now: float) -> None:
        seconds = record.seconds
        if self._pause_began is not None:
            # The time between two steps, minus the second step itself, is the pause between their
            # chunks.
            self._pauses.append(max(0.0, now - self._pause_began - seconds))
        self._pause_began = now if record.step in self._stage.chunk_ends else None
        self._step_seconds.append(seconds)
        self._steps_seen += 1

    def _is_line_due(self, record: StepRecord) -> bool:
        return (
            self._is_verbose
            or self._steps_seen == 1
            or record.step % self._look.every_steps == 0
            or record.step in self._stage.chunk_ends
            or record.step >= self._stage.total_steps
            or not math.isfinite(record.loss)
            or not record.applied
        )

    def _step_line(self, record: StepRecord) -> str:
        stamp = self._stamp()
        parts = step_parts(record, self._stage, self._is_verbose)
        room = _columns(self._stream) - 1 - len(stamp) - 1
        if not self._is_terminal:
            parts = {"name": self._stage.name, **parts, "left": self._left(record.step)}
        lines = [list(parts.items())]
        if self._is_terminal:
            # Verbose lines have all parts, on as many lines as they take.
            lines = wrapped(parts if self._is_verbose else fitting(parts, room), room)
        wrong = not (math.isfinite(record.loss) and record.applied)
        colors = {"loss": "red" if wrong else "bold", "step": "bold"}
        indent = "\n" + " " * (len(stamp) + 1)
        shown = indent.join(
            " ".join(self._paint(text, colors.get(name, "")) for name, text in line)
            for line in lines
        )
        return f"{self._paint(stamp, 'dim')} {shown}"

    def _live_line(self, step: int, ended: bool = False) -> str:
        """Longest text that fits the terminal. A wrapped line cannot be redrawn in place."""
        columns = _columns(self._stream) - 1
        total = max(1, self._stage.total_steps)
        parts = {
            "name": self._stage.name,
            "bar": self._bar(step, 20 if columns >= WIDE_COLUMNS else 10),
            "percent": f"{100 * min(step, total) // total}%",
            "position": f"step {step}/{total}",
            "elapsed": f"elapsed {duration(self._clock() - self._began)}",
            "left": self._left(step),
        }
        if ended:
            # The pause at the end of the last chunk is over, too.
            del parts["left"]
        kept = fitting(parts, columns, LEAST_OF_LIVE)
        text = " ".join(kept.values())
        if len(text) > columns:
            return text[:columns]
        colors = {"bar": "green", "percent": "bold"}
        return " ".join(self._paint(text, colors.get(name, "")) for name, text in kept.items())

    def _left(self, step: int) -> str:
        left = self.seconds_left(step)
        if left is None:
            return "left ?"
        # Pauses for saves and held-out losses come on top until one has been measured.
        unmeasured = "" if self._pauses or step >= self._stage.total_steps else " + saves"
        return f"left {duration(left)}{unmeasured}"

    def _bar(self, step: int, cells: int) -> str:
        """Progress bar: `#` for consumed chunks, `=` for the finished part of the current one."""
        ends, total = self._stage.chunk_ends, max(1, self._stage.total_steps)
        chunk = self._stage.chunk_of(step)
        before = 0 if chunk == 1 else ends[chunk - 2]
        consumed = step if step in ends else before
        solid = cells * consumed // total
        done = min(cells, cells * step // total)
        return "[" + "#" * solid + "=" * (done - solid) + "." * (cells - done) + "]"

    def _stamp(self) -> str:
        """Local time, with the date in a log."""
        return self._now().strftime("%H:%M:%S" if self._is_terminal else "%Y-%m-%d %H:%M:%S")

    def _paint(self, text: str, color: str) -> str:
        if not (self._has_color and color):
            return text
        return f"\x1b[{COLORS[color]}m{text}\x1b[0m"

    def _print(self, line: str) -> None:
        """Print lines that stay, above the live line."""
        if not self._is_live:
            self._write(f"{line}\n")
            return
        drawn = self._drawn
        self._write(f"\r\x1b[K{line}\n")
        self._drawn = ""
        if drawn:
            self._draw(drawn)

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
