"""A mirror from the record alone: what was undone, the order of rows, damaged lines, no ledger."""

from dataclasses import replace
from pathlib import Path

import pytest

from k2train.errors import RunError
from k2train.record.event import Event
from k2train.record.events import CheckpointSaved, Finished, Resumed, Spike, Started
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import StepRecord
from k2train.train.mirror_rebuild import rebuild
from tests.support.events import event
from tests.support.recorded import step, write_ledger, write_records


class Seen:
    """A mirror that keeps what it is given, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def step(self, record: StepRecord) -> None:
        self.seen.append(("step", record.step, record.attempt))

    def score(self, record: HeldOutRecord) -> None:
        self.seen.append(("score", record.step, record.attempt))

    def replayed(self, event: Event, time: str, undone: bool) -> None:
        self.seen.append((event.name, undone))


def test_the_branch_is_written_in_its_order(tmp_path: Path) -> None:
    """Catches the score of a checkpoint that a return undid, steps behind the save that they were
    done before, and events of a branch that is gone left out.
    """
    saved = event(CheckpointSaved, attempt=1, checkpoint="ckpt_001", step=2)
    gone = replace(saved, checkpoint="ckpt_002", step=4)
    spike = Spike(attempt=1, policy="alert", usual_loss=2.0, kind="opened", step=3)
    write_ledger(
        tmp_path,
        [
            (0.0, event(Started, attempt=1)),
            (2.0, saved),
            (3.0, spike),
            (4.0, gone),
            (5.0, event(Resumed, attempt=2, step=2, checkpoint="ckpt_001")),
            (6.0, event(Finished, attempt=2, step=5)),
        ],
    )
    rows = [step(n) for n in range(1, 5)] + [step(n, attempt=2) for n in range(3, 6)]
    scores = [HeldOutRecord(n, 1, "held_out", 3.0, 1, 0, 9) for n in (0, 2, 4)]
    scores.append(HeldOutRecord(5, 2, "held_out", 3.0, 1, 0, 9))
    write_records(tmp_path, rows, scores)
    mirror = Seen()
    assert rebuild(tmp_path, mirror) == (5, 3)  # type: ignore[arg-type]
    assert mirror.seen == [
        ("started", False),
        ("score", 0, 1),
        ("step", 1, 1),
        ("step", 2, 1),
        ("score", 2, 1),
        ("checkpoint_saved", False),
        ("spike", False),
        ("checkpoint_saved", True),
        ("resumed", False),
        ("step", 3, 2),
        ("step", 4, 2),
        ("step", 5, 2),
        ("score", 5, 2),
        ("finished", False),
    ]


def test_what_is_damaged_or_missing(tmp_path: Path) -> None:
    """Catches a rebuild that one rotten line ends, and a traceback for a run without steps."""
    write_ledger(tmp_path, [(0.0, event(Started, attempt=1))])
    assert rebuild(tmp_path, Seen()) == (0, 0)  # type: ignore[arg-type]
    write_records(tmp_path, [step(1), step(2)])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"loss": 2.0', b'"loss": 3.0', 1))
    mirror = Seen()
    assert rebuild(tmp_path, mirror) == (1, 0)  # type: ignore[arg-type]
    assert mirror.seen[-1] == ("step", 2, 1)
    (tmp_path / "ledger.jsonl").write_bytes(b"{}\n")
    with pytest.raises(RunError, match=r"ledger\.jsonl"):
        rebuild(tmp_path, Seen())  # type: ignore[arg-type]
