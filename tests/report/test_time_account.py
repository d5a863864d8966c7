"""Effective training time: seconds lost, counted twice, or booked on the wrong kind or attempt."""

from dataclasses import replace
from pathlib import Path

import pytest

from k2train.record.events import (
    CheckpointSaved,
    CheckpointsMerged,
    ChunkDeferred,
    Event,
    Failed,
    Finished,
    LedgerMended,
    Resumed,
    Started,
    Starting,
)
from k2train.record.held_out import HeldOutRecord
from k2train.record.ledger import read_ledger
from k2train.report.time_account import KINDS, attempt_times, summed
from tests.support.events import event
from tests.support.recorded import step, write_ledger


def test_every_second_of_two_attempts_is_booked_once(tmp_path: Path) -> None:
    """Catches steps that were done again counted as useful, and the time between attempts lost."""
    # Attempt 1: 5 s of start, 6 steps, a save that stalls 2 s; killed, recorded 100 s later.
    write_ledger(
        tmp_path,
        [
            (0.0, event(Starting, attempt=1)),
            (5.0, event(Started, attempt=1)),
            (20.0, event(CheckpointSaved, attempt=1, step=4, stalled_seconds=2.0)),
            (120.0, event(Starting, attempt=2)),
            (120.5, event(Failed, attempt=1, problem="killed")),
            (123.0, event(Resumed, attempt=2, step=4)),
            (140.0, event(Finished, attempt=2, step=8)),
        ],
    )
    first = [step(n, seconds=3.0) for n in range(1, 7)]
    second = [step(n, attempt=2, seconds=2.0) for n in range(5, 9)]
    second[1] = replace(second[1], applied=False)
    score = HeldOutRecord(4, 1, "held_out", 2.0, 1, 0, 9, {}, 0.5)
    times = attempt_times(read_ledger(tmp_path / "ledger.jsonl"), [*first, *second], [score])

    one, two = times
    assert (one.first_step, one.last_step, two.first_step, two.last_step) == (1, 6, 5, 8)
    # Its steps and the rest took longer than its last line says: 5 + 18 + 2 + 0.5 seconds.
    assert one.seconds == 25.5 and one.spent.other == 0.0
    assert (one.spent.useful, one.spent.redone, one.spent.saving) == (12.0, 6.0, 2.0)
    assert (one.spent.evaluating, one.spent.starting, one.spent.down) == (0.5, 5.0, 0.0)

    assert two.seconds == 20.0
    assert (two.spent.useful, two.spent.skipped, two.spent.starting) == (6.0, 2.0, 3.0)
    assert two.spent.down == pytest.approx(120.0 - 25.5) and two.spent.other == 9.0

    whole = summed(times)
    assert whole.total == pytest.approx(140.0)
    assert whole.effective_share == pytest.approx(18.0 / 140.0)


def test_steps_behind_a_return_are_redone_and_not_useful(tmp_path: Path) -> None:
    """Catches a run that went back, within one attempt, and counts its lost steps as useful."""
    write_ledger(tmp_path, [(0.0, event(Starting, attempt=1)), (0.0, event(Started, attempt=1))])
    went = [step(n) for n in (1, 2, 3, 4)]
    again = [replace(step(n), attempt=2) for n in (3,)]
    (one,) = attempt_times(read_ledger(tmp_path / "ledger.jsonl"), [*went, *again])
    # Steps 3 and 4 of the first pass do not count: the run is at step 3 of the second.
    assert (one.spent.useful, one.spent.redone) == (2.0, 2.0)


@pytest.mark.parametrize("written", (CheckpointsMerged, ChunkDeferred, LedgerMended))
def test_what_a_tool_writes_later_is_no_time_of_the_run(
    tmp_path: Path, written: type[Event]
) -> None:
    """Catches a merge, hours after the end, that makes the last start last until then."""
    write_ledger(
        tmp_path,
        [
            (0.0, event(Starting, attempt=1)),
            (2.0, event(Started, attempt=1)),
            (9.0, event(Finished, attempt=1, step=5)),
            (7200.0, event(written)),
        ],
    )
    (one,) = attempt_times(read_ledger(tmp_path / "ledger.jsonl"), [step(5)])
    assert one.seconds == 9.0


def test_a_run_without_steps_has_no_share(tmp_path: Path) -> None:
    """Catches a division by the zero seconds of a run that has just begun."""
    write_ledger(tmp_path, [(0.0, event(Starting, attempt=1))])
    (one,) = attempt_times(read_ledger(tmp_path / "ledger.jsonl"), [])
    assert one.seconds == 0.0 and summed([one]).effective_share == 0.0
    assert len(KINDS) == 8
