"""Console: step lines, messages with their time, the live line of a terminal, time left.

Would catch a log flooded or starved of lines, a bar that wraps, and an invented time left.
"""

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TextIO

import pytest

from k2train.record.console import Console, Look
from k2train.record.metrics import StepRecord
from k2train.record.step_line import StageFacts, fitting, flops_text, step_parts
from tests.support.terminal import Terminal, terminal_of

STAMP = "2026-03-01 09:08:07 "
ESCAPES = re.compile(r"\x1b\[[0-9;]*[mK]")


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _console(
    stream: TextIO,
    name: str = "s",
    total_steps: int = 96,
    total_chunks: int = 8,
    chunk_ends: Sequence[int] | None = None,
    clock: Callable[[], float] | None = None,
    look: Look | None = None,
    **facts: Any,
) -> Console:
    """A console at a fixed time; without `chunk_ends` chunks are equally long."""
    ends = [-(-total_steps * (i + 1) // total_chunks) for i in range(total_chunks)]
    stage = StageFacts(name, total_steps, chunk_ends or ends, **facts)
    return Console(stream, stage, look, clock or Clock(), lambda: datetime(2026, 3, 1, 9, 8, 7))


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


def test_a_log_line_shows_time_place_loss_norm_rate_and_speed() -> None:
    """Catches a line without its time, and a unit that changes from line to line."""
    stream = io.StringIO()
    _console(stream, "stage1").step(_record(34))
    assert stream.getvalue() == (
        f"{STAMP}stage1 chunk 3/8 step 34/96 loss 5.1234 grad_norm 1.25 lr 0.00015 1234 tok/s "
        "1.00 s left 1m02s + saves\n"
    )


def test_every_line_of_a_log_has_its_time() -> None:
    """Catches a message that cannot be set against the log of another machine."""
    stream = io.StringIO()
    console = _console(stream, "stage1", look=Look(detail="verbose"))
    console.progress("building the model", at_once=True)
    console.info("saved ckpt_000")
    console.progress("batch 1")
    for step in range(1, 4):
        console.step(_record(step))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6 and all(line.startswith(f"{STAMP}stage1 ") for line in lines)


def test_speed_of_the_device_memory_and_device_are_shown_where_known() -> None:
    """Catches a share of the peak where none is known, and FLOP/s of the whole world."""
    stage = StageFacts("s", 96, [96], rank_flops_per_token=6e6 / 4, device="cuda:1")
    known = StepRecord(3, mfu=0.4127, tokens_per_second=1e6, peak_memory_bytes=3 * 2**30)
    assert step_parts(known, stage)["flops"] == "MFU 41.3%"
    assert step_parts(known, stage)["memory"] == "peak 3.00 GiB"
    assert step_parts(known, stage)["device"] == "on cuda:1"
    unknown = StepRecord(3, tokens_per_second=1e6)
    assert step_parts(unknown, stage)["flops"] == "1.50 TFLOP/s"
    assert not {"memory", "update_norm", "subsets"} & step_parts(unknown, stage).keys()
    assert "flops" not in step_parts(unknown, StageFacts("s", 96, [96]))
    assert [flops_text(x) for x in (4.123e14, 1.83e10, 5e6)] == [
        "412 TFLOP/s",
        "18.3 GFLOP/s",
        "5.00 MFLOP/s",
    ]


def test_the_least_important_parts_go_first() -> None:
    parts = {"a": "1" * 10, "b": "2" * 10, "c": "3" * 10}
    assert list(fitting(parts, 32, ("b", "a"))) == ["a", "b", "c"]
    assert list(fitting(parts, 31, ("b", "a"))) == ["a", "c"]
    assert list(fitting(parts, 5, ("b", "a"))) == ["c"]


@pytest.mark.parametrize(("mfu", "speed"), ((0.4127, "MFU 41.3%"), (None, "30.0 GFLOP/s")))
def test_eighty_columns_have_speed_and_memory(mfu: float | None, speed: str) -> None:
    """Catches a terminal of usual width without what one looks at first: use of the device."""
    stage = StageFacts("s", 128, [16, 128], rank_flops_per_token=1e7, device="cuda:0")
    record = StepRecord(
        104,
        loss=5.12341,
        grad_norm=0.9604,
        lr=1.5e-4,
        tokens_per_second=3000.0,
        seconds=1.5,
        mfu=mfu,
        peak_memory_bytes=61 * 2**30,
    )
    parts = step_parts(record, stage)
    assert parts["grad_norm"] == "grad_norm 0.960" and parts["memory"] == "peak 61.00 GiB"
    assert " ".join(fitting(parts, 70).values()) == (
        f"step 104/128 loss 5.1234 norm 0.960 3000 tok/s {speed} 61.00 GiB"
    )
    assert list(fitting(parts, 200)) == list(parts) and len(parts) == 10


def test_the_last_step_of_a_chunk_belongs_to_it() -> None:
    stream = io.StringIO()
    console = _console(stream)
    for step in (12, 13, 96):
        console.step(_record(step))
    assert re.findall(r"chunk (\d+)/8", stream.getvalue()) == ["1", "2", "8"]
    uneven = io.StringIO()
    console = _console(uneven, "s", 10, 2, chunk_ends=[9, 10])
    for step in (8, 9, 10):
        console.step(_record(step))
    assert re.findall(r"chunk (\d+)/2", uneven.getvalue()) == ["1", "1", "2"]


def _steps_shown(look: Look, seconds: float) -> list[int]:
    stream, clock = io.StringIO(), Clock()
    console = _console(stream, "s", 240, 2, clock=clock, look=look)
    _run(console, clock, range(3, 241), seconds)
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    return [int(step) for step in re.findall(r"step (\d+)/", stream.getvalue())]


def test_a_log_has_a_line_every_so_many_steps_whatever_they_take() -> None:
    """Catches steps that are missing because they were fast: they look like lost ones."""
    assert _steps_shown(Look(), 0.001) == _steps_shown(Look(), 60.0) == list(range(3, 241))
    tens = [3, *range(50, 241, 50), 120, 240]
    assert _steps_shown(Look(every_steps=50), 0.001) == sorted(tens)
    assert _steps_shown(Look(every_steps=50), 60.0) == sorted(tens)
    assert _steps_shown(Look(every_steps=50, detail="verbose"), 1.0) == list(range(3, 241))


def test_a_step_gone_wrong_is_shown_between_those_that_are_due() -> None:
    stream = io.StringIO()
    console = _console(stream, "s", 1000, 1, look=Look(every_steps=100))
    for step in range(1, 13):
        console.step(_record(step))
    console.step(_record(13, 0.01, float("nan")))
    assert "step 12/" not in stream.getvalue() and "step 13/1000 loss nan" in stream.getvalue()


def test_quiet_has_messages_only(terminal: Terminal) -> None:
    """Catches a live line, a step or a progress that `--quiet` still shows."""
    stream = terminal.stream
    log = io.StringIO()
    for console in (
        _console(stream, look=Look(detail="quiet")),
        _console(log, look=Look(detail="quiet")),
    ):
        console.progress("building the model", at_once=True)
        console.step(_record(1))
        console.info("saved ckpt_000")
        console.step(_record(96))
        console.close()
    assert log.getvalue() == f"{STAMP}s saved ckpt_000\n"
    assert ESCAPES.sub("", terminal.shown()) == "09:08:07 saved ckpt_000\n"


def test_verbose_has_all_that_is_known() -> None:
    stream = io.StringIO()
    record = StepRecord(
        1, loss=1.0, seconds=1.0, update_norm=0.25, subsets={"code": [10, 1.5], "web": [6, 2]}
    )
    _console(stream, look=Look(detail="verbose")).step(record)
    assert "update_norm 0.250 by subset: code 1.5000, web 2.0000" in stream.getvalue()


@pytest.mark.parametrize(
    "color, no_color, colored", [("auto", "", False), ("on", "1", True), ("off", "", False)]
)
def test_colour_in_a_log_only_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, color: str, no_color: str, colored: bool
) -> None:
    """Catches control characters in a log file."""
    monkeypatch.setenv("NO_COLOR", no_color)
    stream = io.StringIO()
    console = _console(stream, look=Look(color=color))
    console.step(_record(1))
    console.info("step 1 skipped, loss not finite")
    assert ("\x1b[" in stream.getvalue()) == colored
    assert ESCAPES.sub("", stream.getvalue()).splitlines()[1] == (
        f"{STAMP}s step 1 skipped, loss not finite"
    )


def test_no_color_is_obeyed_on_a_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = terminal.stream
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        console = _console(stream)
        console.step(_record(1))
        console.close()
        assert (re.search(r"\x1b\[\d+m", terminal.shown()) is None) == bool(value)


def test_time_left_counts_pauses_and_forgets_the_slow_first_step() -> None:
    clock = Clock()
    console = _console(io.StringIO(), "s", 40, 4, clock=clock)
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
    console = _console(io.StringIO(), "s", 100, 1, clock=clock)
    _run(console, clock, range(1, 21), 1.0)
    console.step(_record(21, 500.0))
    assert console.seconds_left(21) == pytest.approx(79)


def test_a_closed_stream_does_not_end_the_run() -> None:
    stream = io.StringIO()
    console = _console(stream, "s", 10, 1)
    stream.close()
    console.step(_record(1))
    console.info("x")
    console.close()
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", closefd=True) as broken:
        console = _console(broken, "s", 10, 1)
        console.step(_record(1))
        console.close()
        # What is left in Python's own buffer would fail once more on close.
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal of 80 columns."""
    monkeypatch.setenv("TERM", "xterm")
    with terminal_of(80) as made:
        yield made


def _drawn(text: str) -> list[str]:
    """The lines that were drawn in place, without their colours."""
    found = re.findall(r"\r([^\r\n]*)\x1b\[K", text)
    return [ESCAPES.sub("", line) for line in found]


def test_step_lines_stay_above_one_live_line(terminal: Terminal) -> None:
    """Catches a terminal on which no step stays, and a live line that is left in between."""
    stream = terminal.stream
    clock = Clock()
    console = _console(stream, "stage1", clock=clock)
    _run(console, clock, range(33, 35), 1.0)
    console.info("ckpt_003 saved")
    console.close()
    console.close()
    shown = terminal.shown()
    stays = [ESCAPES.sub("", line.rpartition("\r")[2]) for line in shown.split("\n")[:-1]]
    assert stays == [
        "09:08:07 chunk 3/8 step 33/96 loss 5.1234 grad_norm 1.25 1234 tok/s 1.00 s",
        "09:08:07 chunk 3/8 step 34/96 loss 5.1234 grad_norm 1.25 1234 tok/s 1.00 s",
        "09:08:07 ckpt_003 saved",
        "stage1 [##=.......] 35% step 34/96 elapsed 2s left 1m02s + saves",
    ], "the live line is kept at the end"
    drawn = [line for line in _drawn(shown) if line]
    assert drawn[0] == "stage1 [##=.......] 34% step 33/96 elapsed 1s left 1m03s + saves"
    assert drawn[-1] == "stage1 [##=.......] 35% step 34/96 elapsed 2s left 1m02s + saves"
    assert drawn[-2] == drawn[-1], "it comes back below the message"
    assert all(len(line) < 80 for line in (*drawn, *stays))


def test_a_finished_run_has_nothing_left(terminal: Terminal) -> None:
    """Catches `100% ... left 2s` as the last word of a run that is done."""
    stream = terminal.stream
    clock = Clock()
    console = _console(stream, total_steps=4, chunk_ends=[2, 4], clock=clock)
    _run(console, clock, range(1, 5), seconds=1.0, pause_after=(2,))
    clock.now += 2.0
    console.close()
    *_, before, last = _drawn(terminal.shown())
    assert before == "s [##########] 100% step 4/4 elapsed 7s left 3s"
    assert last == "s [##########] 100% step 4/4 elapsed 9s"


def test_a_wide_terminal_shows_all_and_a_narrow_one_never_wraps(
    terminal: Terminal,
) -> None:
    stream = terminal.stream
    console = _console(stream, "stage1", rank_flops_per_token=1e6, device="cuda:0")
    for columns in (200, 120, 80, 60, 20):
        terminal.resize(columns)
        console.step(_record(34))
        text = terminal.shown()
        assert len(_drawn(text)[-1]) < columns
        stays = [ESCAPES.sub("", line.rpartition("\r")[2]) for line in text.split("\n")[:-1]]
        assert columns == 20 or all(len(line) < columns for line in stays)
        if columns == 200:
            assert "stage1 [#####==.............] 35% step 34/96 elapsed" in _drawn(text)[-1]
            assert "lr 0.00015 1234 tok/s 1.00 s 1.23 GFLOP/s on cuda:0" in stays[-1]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_verbose_line_is_folded_between_its_parts(terminal: Terminal, columns: int) -> None:
    """Catches a number that is cut in two at the edge of the screen, and a part that is lost."""
    terminal.resize(columns)
    losses = {name: (10, 1.5) for name in ("code", "docstrings", "prose", "web", "books")}
    record = replace(_record(5), peak_memory_bytes=2**30, update_norm=0.5, subsets=losses)
    _console(terminal.stream, look=Look(detail="verbose")).step(record)
    stays, _, _ = ESCAPES.sub("", terminal.shown()).replace("\r", "").rpartition("\n")
    first, *rest = stays.split("\n")
    assert rest and all(len(line) < columns for line in (first, *rest))
    assert all(line.startswith(" " * 9) for line in rest)
    said = " ".join(line.strip() for line in (first, *rest))
    assert said.endswith(
        "by subset: code 1.5000, docstrings 1.5000, prose 1.5000, web 1.5000, books 1.5000"
    )
    parts = step_parts(record, StageFacts("s", 96, [*range(12, 97, 12)]), verbose=True)
    assert said == " ".join(["09:08:07", *parts.values()])


def test_a_long_message_is_folded_between_words(terminal: Terminal) -> None:
    """Catches a message cut inside a path, and one whose lines begin under the time."""
    stream = terminal.stream
    path = "runs/a-long-name/" + "x" * 40
    _console(stream).info(f"one two three four five six seven eight {path} nine ten " * 2)
    lines = ESCAPES.sub("", terminal.shown().replace("\r", "")).splitlines()
    assert len(lines) > 2 and all(len(line) < 80 for line in lines)
    assert all(line.startswith(" " * 9) and line[9] != " " for line in lines[1:])
    assert sum(path in line for line in lines) == 2


def test_a_dumb_terminal_gets_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = terminal.stream
    monkeypatch.setenv("TERM", "dumb")
    console = _console(stream, "s", 10, 1)
    console.step(_record(1))
    console.info("saved")
    shown = terminal.shown()
    assert "\x1b" not in shown and shown.endswith(f"\n{STAMP}s saved\n")


def test_work_between_steps_is_a_live_line_that_goes_away(terminal: Terminal) -> None:
    """Catches a silent evaluation, and one that still stands there when it is over."""
    stream = terminal.stream
    console = _console(stream, "stage1")
    console.progress("held-out loss: batch 1 of 4")
    console.progress("held-out loss: batch 2 of 4")
    console.info("a note")
    console.progress("")
    console.close()
    shown = terminal.shown()
    drawn = [line for line in _drawn(shown) if line]
    assert drawn[:2] == [f"stage1 held-out loss: batch {n} of 4" for n in (1, 2)]
    assert drawn[2] == drawn[1] and shown.endswith("\r\x1b[K") and shown.count("\n") == 1


def test_after_work_between_steps_the_line_of_the_last_step_is_back(
    terminal: Terminal,
) -> None:
    """Catches a live line that stays away until the next step, which may take minutes."""
    stream = terminal.stream
    console = _console(stream, "stage1")
    console.progress("step 1 of 96")
    console.step(_record(1))
    console.progress("saving ckpt_001")
    console.progress("")
    console.close()
    drawn = [line for line in _drawn(terminal.shown()) if line]
    assert drawn[0] == "stage1 step 1 of 96" and "1% step 1/96" in drawn[-1]
    assert drawn[-2] == "stage1 saving ckpt_001"


def test_a_log_has_a_line_of_long_work_now_and_then() -> None:
    """Catches a log flooded by batches, and minutes without a line."""
    stream, clock = io.StringIO(), Clock()
    console = _console(stream, "s", 10, 1, clock=clock)
    for batch in range(12):
        console.progress(f"batch {batch}")
        clock.now += 1.0
    console.progress("")
    console.progress("short")
    console.progress("")
    console.progress("loading ckpt_003", at_once=True)
    console.progress("")
    assert stream.getvalue() == "".join(
        f"{STAMP}s {text}\n" for text in ("batch 5", "batch 10", "loading ckpt_003")
    )
