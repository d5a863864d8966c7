"""Console progress: terminal line, log lines, time left.

Would catch a log flooded or starved of lines, a bar that wraps, and an invented time left.
"""

import fcntl
import io
import os
import pty
import re
import select
import struct
import termios
import tty
from collections.abc import Iterator
from itertools import pairwise
from typing import TextIO

import pytest

from k2train.record.console import Console
from k2train.record.metrics import StepRecord


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _record(step: int, seconds: float = 1.0, loss: float = 5.12341) -> StepRecord:
    return StepRecord(
        step, loss=loss, grad_norm=1.25, lr=1.5e-4, tokens_per_second=1234.4, seconds=seconds
    )


def _run(
    console: Console, clock: Clock, steps: range, seconds: float, pause_after: tuple[int, ...] = ()
) -> None:
    for step in steps:
        clock.now += seconds
        console.step(_record(step, seconds))
        clock.now += 3.0 if step in pause_after else 0.0


def test_a_line_shows_place_loss_norm_rate_speed_and_seconds() -> None:
    stream = io.StringIO()
    Console(stream, "stage1", 96, 8).step(_record(34))
    assert stream.getvalue() == (
        "stage1 chunk 3/8 step 34/96 loss 5.1234 grad_norm 1.25 lr 0.00015 1234 tok/s 1.00 s left "
        "1m02s+\n"
    )


def test_the_last_step_of_a_chunk_belongs_to_it() -> None:
    stream = io.StringIO()
    console = Console(stream, "s", 96, 8)
    for step in (12, 13, 96):
        console.step(_record(step))
    assert re.findall(r"chunk (\d+)/8", stream.getvalue()) == ["1", "2", "8"]
    uneven = io.StringIO()
    console = Console(uneven, "s", 10, 2, chunk_ends=[9, 10])
    for step in (8, 9, 10):
        console.step(_record(step))
    assert re.findall(r"chunk (\d+)/2", uneven.getvalue()) == ["1", "1", "2"]


def test_a_log_gets_the_first_ten_then_one_in_five_seconds_and_every_chunk_end() -> None:
    stream, clock = io.StringIO(), Clock()
    _run(Console(stream, "s", 240, 2, clock=clock), clock, range(1, 241), 0.1)
    shown = [int(step) for step in re.findall(r"step (\d+)/", stream.getvalue())]
    assert shown[:10] == list(range(1, 11))
    assert 120 in shown and shown[-1] == 240
    assert all(step in (120, 240) or before + 49 <= step for before, step in pairwise(shown[9:]))
    assert len(shown) <= 10 + 6
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_every_step_is_shown_when_there_are_few_and_every_step_gone_wrong() -> None:
    stream, clock = io.StringIO(), Clock()
    _run(Console(stream, "s", 20, 2, clock=clock), clock, range(1, 21), 0.01)
    assert stream.getvalue().count("\n") == 20
    stream = io.StringIO()
    console = Console(stream, "s", 1000, 1, clock=clock)
    _run(console, clock, range(1, 13), 0.01)
    console.step(_record(13, 0.01, float("nan")))
    assert "step 12/" not in stream.getvalue() and "step 13/1000 loss nan" in stream.getvalue()


def test_time_left_counts_pauses_and_forgets_the_slow_first_step() -> None:
    clock = Clock()
    console = Console(io.StringIO(), "s", 40, 4, clock=clock)
    assert console.seconds_left(0) is None
    clock.now += 60
    console.step(_record(1, 60.0))
    _run(console, clock, range(2, 3), 2.0)
    assert console.seconds_left(2) == pytest.approx(76)
    _run(console, clock, range(3, 11), 2.0, pause_after=(10,))
    # 30 steps of 2 s, the pauses not yet measured.
    assert console.seconds_left(10) == pytest.approx(60)
    _run(console, clock, range(11, 12), 2.0)
    # 29 steps of 2 s and the pauses after steps 20, 30 and 40, 3 s each.
    assert console.seconds_left(11) == pytest.approx(58 + 9)
    _run(console, clock, range(12, 41), 2.0, pause_after=(20, 30))
    assert console.seconds_left(40) == pytest.approx(3)


def test_one_stall_does_not_move_the_time_left() -> None:
    clock = Clock()
    console = Console(io.StringIO(), "s", 100, 1, clock=clock)
    _run(console, clock, range(1, 21), 1.0)
    console.step(_record(21, 500.0))
    assert console.seconds_left(21) == pytest.approx(79)


def test_a_closed_stream_does_not_end_the_run() -> None:
    stream = io.StringIO()
    console = Console(stream, "s", 10, 1)
    stream.close()
    console.step(_record(1))
    console.info("x")
    console.close()
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", closefd=True) as broken:
        console = Console(broken, "s", 10, 1)
        console.step(_record(1))
        console.close()
        # What is left in Python's own buffer would fail once more on close.
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TextIO, int]]:
    """(stream that is a terminal of 80 columns, descriptor from which its output can be read)."""
    monkeypatch.setenv("TERM", "xterm")
    outside, inside = pty.openpty()
    tty.setraw(inside)
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(inside, "w") as stream:
        yield stream, outside
    os.close(outside)


def _shown(outside: int) -> str:
    """All that was written so far: a terminal hands it over in pieces, whenever it likes."""
    data = b""
    while select.select([outside], [], [], 0.3)[0]:
        data += os.read(outside, 65536)
    return data.decode()


def test_a_terminal_gets_one_line_redrawn_in_place(terminal: tuple[TextIO, int]) -> None:
    stream, outside = terminal
    clock = Clock()
    console = Console(stream, "stage1", 96, 8, clock=clock)
    _run(console, clock, range(33, 35), 1.0)
    console.info("ckpt_003 saved")
    console.close()
    console.close()
    shown = _shown(outside)
    assert shown.count("\n") == 2, "one for the note, one on closing"
    drawn = re.findall(r"\r([^\r\n]*)\x1b\[K", shown)
    assert len(drawn) == 4
    assert drawn[0].startswith("stage1 chunk 3/8 step 33/96 ")
    assert drawn[1] == "stage1 chunk 3/8 step 34/96 [##=.......] loss 5.1234 1234 tok/s left 1m02s+"
    assert drawn[2] == "" and "\r\x1b[Kckpt_003 saved\n\r" in shown
    assert drawn[3] == drawn[1], "the bar comes back below the note"
    assert all(len(line) < 80 for line in drawn)


def test_a_wide_terminal_shows_all_and_a_narrow_one_never_wraps(
    terminal: tuple[TextIO, int],
) -> None:
    stream, outside = terminal
    console = Console(stream, "stage1", 96, 8)
    for columns in (200, 60, 20):
        fcntl.ioctl(stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        console.step(_record(34))
        text = re.findall(r"\r([^\r\n]*)\x1b\[K", _shown(outside))[-1]
        assert len(text) < columns
        if columns == 200:
            assert "step 34/96 [#####==.............] loss" in text
            assert "grad_norm 1.25 lr 0.00015 1234 tok/s 1.00 s left" in text


def test_a_dumb_terminal_gets_plain_lines(
    terminal: tuple[TextIO, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, outside = terminal
    monkeypatch.setenv("TERM", "dumb")
    console = Console(stream, "s", 10, 1)
    console.step(_record(1))
    console.info("saved")
    shown = _shown(outside)
    assert "\x1b" not in shown and shown.endswith("\ns saved\n")


def test_work_between_steps_is_a_live_line_that_goes_away(terminal: tuple[TextIO, int]) -> None:
    """Catches a silent evaluation, and one that still stands there when it is over."""
    stream, outside = terminal
    console = Console(stream, "stage1", 96, 8)
    console.progress("held-out loss: batch 1 of 4")
    console.progress("held-out loss: batch 2 of 4")
    console.info("a note")
    console.progress("")
    console.close()
    shown = _shown(outside)
    drawn = re.findall(r"\r([^\r\n]*)\x1b\[K", shown)
    assert drawn[:2] == [f"stage1 held-out loss: batch {n} of 4" for n in (1, 2)]
    assert drawn[3] == drawn[1] and shown.endswith("\r\x1b[K") and shown.count("\n") == 1


def test_a_step_takes_the_place_of_what_came_before(terminal: tuple[TextIO, int]) -> None:
    """Catches a live line that a later end of work wipes away."""
    stream, outside = terminal
    console = Console(stream, "stage1", 96, 8)
    console.progress("step 1 of 96")
    console.step(_record(1))
    console.progress("")
    console.close()
    drawn = re.findall(r"\r([^\r\n]*)\x1b\[K", _shown(outside))
    assert drawn[0] == "stage1 step 1 of 96" and "step 1/96" in drawn[1] and len(drawn) == 2


def test_a_log_has_a_line_of_long_work_now_and_then() -> None:
    """Catches a log flooded by batches, and minutes without a line."""
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, "s", 10, 1, clock=clock)
    for batch in range(12):
        console.progress(f"batch {batch}")
        clock.now += 1.0
    console.progress("")
    console.progress("short")
    console.progress("")
    assert stream.getvalue() == "s batch 5\ns batch 10\n"
