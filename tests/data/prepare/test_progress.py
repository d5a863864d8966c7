"""Progress of a preparation: lines of a log, and a bar that fits the terminal."""

import io
import re

from k2train.data.prepare.progress import Progress
from tests.support.terminal import terminal_of


def test_one_thing_is_not_many() -> None:
    """Catches `1 tasks`, and `1 of 1 tasks`."""
    shown = io.StringIO()
    progress = Progress(shown)
    assert list(progress.track("plan", [7], unit="task")) == [7]
    assert list(progress.track("chunks", iter(range(1200)), unit="task")) == list(range(1200))
    assert re.sub(r"\d\.\d s", "0.0 s", shown.getvalue()).splitlines() == [
        "plan: 1 task in 0.0 s",
        "chunks: 1,200 tasks in 0.0 s",
    ]


def test_a_bar_is_no_wider_than_its_terminal() -> None:
    """Catches a bar of 100 columns, which leaves a line behind at each redraw of a narrow one."""
    with terminal_of(60) as terminal:
        assert len(list(Progress(terminal.stream).track("encode", range(3), unit="task"))) == 3
        shown = terminal.shown()
    lines = re.split(r"[\r\n]+", shown)
    assert any("3/3" in line for line in lines)
    assert max(map(len, lines)) <= 60
