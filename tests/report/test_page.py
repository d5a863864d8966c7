"""The page in a real browser: an error in its console, an address, a megabyte, a name that runs."""

import re
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest

from k2train.record.event import Event
from k2train.record.events import (
    CheckpointSaved,
    ChunkStarted,
    Entry,
    Finished,
    Resumed,
    Spike,
    Started,
    Starting,
    StepSkipped,
)
from k2train.record.held_out import HeldOutRecord
from k2train.record.rollback_events import RolledBack
from k2train.report.collect import RunView, read_run
from k2train.report.page import page, write_report
from tests.support.browser import open_page
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records

EVIL = "chunk_<img src=x onerror=alert(1)>"
ADDRESS = re.compile(r"(?:https?:)?//[a-z]|\bsrc=|url\(|@import", re.IGNORECASE)
HOVER = """<script>
const svg = document.querySelector("svg");
const box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 15}));
document.body.dataset.pointed = document.querySelector("output").textContent;
svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", cancelable: true}));
document.body.dataset.left = document.querySelector("output").textContent;
const numbers = document.querySelector(".numbers"), part = numbers.getBoundingClientRect();
document.body.dataset.numbers = [numbers.open, part.left >= box.right,
  part.bottom <= numbers.parentElement.getBoundingClientRect().bottom].join();
</script>"""


def events() -> list[tuple[float, Event]]:
    opened = Spike(attempt=1, policy="alert", usual_loss=2.0, kind="opened", step=10)
    return [
        (0.0, event(Starting, attempt=1)),
        (2.0, event(Started, attempt=1, total_steps=40, chunks=2, layout="tp 1", world_size=4)),
        (2.5, event(ChunkStarted, chunk=EVIL, order_index=0, step=1)),
        (9.0, opened),
        (9.5, replace(opened, kind="benign", step=14, onset=10, peak_loss=9.0)),
        (9.7, event(StepSkipped, step=12, chunk=EVIL, rows=(0, 1), reason="outlier")),
        (
            12.0,
            event(CheckpointSaved, attempt=1, checkpoint="ckpt_001", step=20, chunks_consumed=1),
        ),
        (30.0, event(Starting, attempt=2)),
        (31.0, event(Resumed, attempt=2, step=20, checkpoint="ckpt_001", world_size=4)),
        (60.0, event(RolledBack, step=20, from_step=36, checkpoint="ckpt_001", chunks=("b",))),
        (90.0, event(Finished, attempt=2, step=40)),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    folder = tmp_path_factory.mktemp("runs") / "evil & <b>"
    write_ledger(folder, events())
    rows = [replace(step(n), chunk=EVIL, loss=4 - n / 20) for n in range(1, 31)]
    rows += [replace(step(n, attempt=2), loss=4 - n / 20) for n in range(21, 41)]
    rows[5] = replace(rows[5], loss=float("nan"), applied=False)
    scores = [
        HeldOutRecord(n, 1, "held_out", 3.0, 1, 0, 9, {"code": 2.0, EVIL: 4.0}) for n in (0, 20)
    ]
    write_records(folder, rows, scores)
    return read_run(folder)


def test_a_browser_shows_it_without_an_error(run: RunView, tmp_path: Path) -> None:
    """Catches a script that fails, values that the pointer does not find, and names that run."""
    path = tmp_path / "report.html"
    write_report(path, run)
    text = path.read_text()
    path.write_text(text.replace("</body>", f"{HOVER}</body>"))
    dom, console = open_page(path, tmp_path / "browser")
    assert console == []
    pointed = re.search(r'data-pointed="(.*?)"', dom)
    assert (
        pointed is not None
        and pointed[1].startswith("step 40, 4K tokens, 40 seconds: ")
        and "training 2" in pointed[1]
    )
    left = re.search(r'data-left="(.*?)"', dom)
    assert left is not None and left[1].startswith("step 39, 3.9K tokens, ")
    assert 'data-numbers="false,false,true"' in dom, "a narrow screen has them folded, below"
    assert dom.count("<figure>") >= 6 and "<img" not in dom
    assert "<h1>evil &amp; &lt;b&gt;</h1>" in dom


def test_on_a_wide_screen_the_numbers_stand_beside_the_figure(run: RunView, tmp_path: Path) -> None:
    """Catches numbers that nobody sees, and a long table that pushes the next figure down."""
    path = tmp_path / "report.html"
    path.write_text(page(run).replace("</body>", f"{HOVER}</body>"))
    dom, console = open_page(path, tmp_path / "browser", "--window-size=1400,900")
    assert console == [] and 'data-numbers="true,true,true"' in dom


def test_the_page_asks_for_nothing(run: RunView) -> None:
    """Catches a font, a script or a picture that a login node cannot fetch."""
    text = page(run)
    assert not ADDRESS.search(text.replace("onerror", "").replace("img src=x", ""))
    assert page(run, refresh_seconds=5).count('http-equiv="refresh" content="5"') == 1


def test_what_happened_is_on_it(run: RunView) -> None:
    """Catches spikes, restarts and returns left out, each of which is asked about first."""
    text = page(run)
    for said in (
        f"benign spike, steps 10 to 14, peak loss 9, first read {escape(EVIL)} rows 10 to 10",
        "start 2 from ckpt_001 (step 20)",
        "return from step 36 to ckpt_001 (step 20), b moved to the end",
        f"step 12 left out: outlier, {escape(EVIL)}",
        "10 steps were undone by restarts or returns",
        "finished, 2 starts",
        "40 of 40",
    ):
        assert said in text, said


def test_two_runs_are_drawn_beside_each_other(run: RunView) -> None:
    """Catches a comparison that shows one of the two."""
    text = page(run, replace(run, directory=run.directory.parent / "second"))
    assert "Side by side" in text and "training second" in text


def test_a_hundred_thousand_steps_stay_under_two_megabytes(run: RunView) -> None:
    """Catches a page that grows with the run."""
    records = [replace(step(n), loss=4 - n / 1e5, update_norm=0.1) for n in range(1, 100_001)]
    saved = [
        Entry(n, run.entries[0].time, "", event(CheckpointSaved, checkpoint=f"ckpt_{n:03d}"))
        for n in range(100)
    ]
    long = replace(run, records=records, entries=[*run.entries, *saved])
    text = page(long)
    assert len(text.encode()) < 2_000_000 and text.count("<figure>") >= 6
