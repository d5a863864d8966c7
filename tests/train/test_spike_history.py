"""What the ledger says of earlier spikes: numbers, regions, restarts, and stops that wait.

Would catch a spike that gets a second folder after a kill, a spike of the data that is taken for a
bad restart, and a run that goes on although nobody decided.
"""

from typing import Any

import pytest

from k2train.errors import RunError
from k2train.record.events import ChunkDeferred, Resumed, Spike, Started, Starting, Stopped
from k2train.record.rollback_events import RolledBack
from k2train.train.spike_history import (
    check_decided,
    last_hit,
    moves_of,
    spike_number,
    unfinished_return,
    was_seen_before,
)
from tests.support.events import entries, event
from tests.support.tiny_model import tiny_config


def opened(step: int, attempt: int = 1, kind: str = "opened", onset: int | None = None) -> Spike:
    onset = onset or step
    return Spike(attempt=attempt, policy="alert", kind=kind, step=step, onset=onset, usual_loss=2.0)


def back(number: int = 1, **facts: Any) -> RolledBack:
    facts = {"chunks": ("chunk_002",), "step": 100, "from_step": 300, "onset": 150} | facts
    return event(RolledBack, number=number, **facts)


def test_a_spike_keeps_its_number() -> None:
    """Catches a second folder for a spike that a start repeats after a kill, and one folder for two
    spikes at the same step, before and after a return.
    """
    first = [opened(50), opened(60, kind="benign", onset=50), opened(154, onset=150)]
    assert spike_number(entries(), 50) == 1
    assert [spike_number(entries(*first), onset) for onset in (50, 150, 151)] == [1, 2, 3]
    again = [*first, event(Resumed, attempt=2, step=100), opened(154, attempt=2, onset=150)]
    assert spike_number(entries(*again), 150) == 2
    gone_back = [*again, back(2)]
    assert spike_number(entries(*gone_back), 150) == 3
    assert spike_number(entries(*gone_back, opened(155, 3, "restart", 150)), 150) == 3


def test_a_return_counts_until_a_start_has_followed_it() -> None:
    """Catches a next start that goes on from the branch, and a later one that goes back again."""
    events = [event(Started), opened(150), back(1, checkpoint="ckpt_001")]
    found = unfinished_return(entries(*events, event(Starting, attempt=2)))
    assert found is not None and found.checkpoint == "ckpt_001"
    assert unfinished_return(entries(*events, event(Resumed, attempt=2, step=100))) is None
    assert unfinished_return(entries(event(Started))) is None


def test_a_region_ends_behind_its_branch() -> None:
    """Catches a ladder that counts spikes of the whole run, or restarts, which are no data."""
    returns = [back(1), back(2, chunks=(), from_step=900)]
    assert last_hit(returns, 400) is returns[0]
    assert last_hit(returns, 401) is None
    assert last_hit([], 10) is None
    # Somebody has gone back behind that return, and meets another spike.
    assert last_hit(returns, 100) is None and last_hit(returns, 101) is returns[0]


def test_the_moves_of_a_ledger() -> None:
    """Catches an order that forgets a return or a deferral by hand."""
    events = (event(Started), event(ChunkDeferred), back(1), back(2, chunks=()), opened(5))
    assert [entry.seq for entry in moves_of(entries(*events))] == [1, 2, 3]


def test_a_spike_of_the_data_is_no_bad_restart() -> None:
    """Catches a run, killed during a spike, that blames its own restart: the spike came before the
    kill, too, far from that start.
    """
    events = [event(Started), opened(105)]
    assert was_seen_before(entries(*events), 101, 8)
    assert not was_seen_before(entries(*events), 106, 8)
    assert not was_seen_before(entries(*events), 97, 8)
    # A start that began there itself says nothing, nor does one before a return.
    own = [event(Started), event(Resumed, attempt=2, step=100), opened(105, 2, "restart")]
    assert not was_seen_before(entries(*own), 101, 8)
    assert not was_seen_before(entries(*events, back(1)), 101, 8)


STOPPED = event(Stopped, reason="spike", step=290, problem="spike malignant since step 191")


def test_a_stop_by_a_spike_waits_for_a_decision() -> None:
    """Catches a launcher that starts the run again and again into the same spike."""
    stopped = entries(event(Started), STOPPED)
    with pytest.raises(RunError) as error:
        check_decided(tiny_config(), stopped)
    assert "at step 290: spike malignant since step 191; decide how to go on" in str(error.value)
    assert "run.allow=[spike_at_290]" in str(error.value) and "\n" not in str(error.value)

    for changes in ({"run__allow": ["spike_at_290"]}, {"run__resume": 1}):
        tree = {"run": {"name": "tiny", "seed": 7, **{k[5:]: v for k, v in changes.items()}}}
        check_decided(tiny_config(**tree), stopped)
    # What was decided for another stop is no decision for this one.
    tree = {"run": {"name": "tiny", "seed": 7, "allow": ["spike_at_200"]}}
    with pytest.raises(RunError, match="decide how to go on"):
        check_decided(tiny_config(**tree), stopped)
    tree = {"run": {"name": "tiny", "seed": 7, "resume": 1}}
    went = [event(Started), event(Resumed, attempt=2, requested=1), STOPPED]
    with pytest.raises(RunError, match="decide how to go on"):
        check_decided(tiny_config(**tree), entries(*went))


def test_other_ends_need_no_decision() -> None:
    """Catches a run that refuses to go on after a signal, or after it was decided."""
    check_decided(tiny_config(), entries(event(Started), event(Stopped, reason="SIGTERM")))
    check_decided(tiny_config(), entries(event(Started), STOPPED, event(Starting, attempt=2)))
    check_decided(tiny_config(), [])
