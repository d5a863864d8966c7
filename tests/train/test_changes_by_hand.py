"""Changes by hand at a start: recorded with their kind, reason and expectation, and measured."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2train.record.change_events import Change, Outcome
from k2train.record.events import of_kind
from k2train.record.ledger import read_ledger
from k2train.train.changes_by_hand import changes_of
from tests.support.command_line import load_tool
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, trainer_job

show_run = load_tool("show_run")


@pytest.mark.parametrize(
    ("before", "after", "order", "kinds"),
    (
        ({"lr": {"peak": 0.1}}, {"lr": {"peak": 0.2}}, "abc", ["rate"]),
        ({"data": {"order": None}}, {"data": {"order": [0, 2, 1]}}, "acb", ["defer"]),
        ({"data": {"order": None}}, {"data": {"order": [0, 1]}}, "ab", ["skip"]),
        ({"data": {"order": None}}, {"data": {"order": [0, 1, 2, 3]}}, "abcd", ["config"]),
        ({"spikes": {"policy": "alert"}}, {"spikes": {"policy": "stop"}}, "abc", ["config"]),
        # How to start is no change of the run.
        ({"run": {"allow": []}}, {"run": {"allow": ["lr"], "why": "x"}}, "abc", []),
        ({"lr": {"peak": 0.1}}, {"lr": {"peak": 0.1}}, "acb", []),
    ),
)
def test_kinds(before: Any, after: Any, order: str, kinds: list[str]) -> None:
    """Catches a chunk that is left out and recorded as moved, and a deferral of the ledger that is
    taken for the config's.
    """
    chunks = SimpleNamespace(order=[SimpleNamespace(name=name) for name in "abc"])
    manifest: Any = SimpleNamespace(config=before, chunks=chunks)
    assert [change.kind for change in changes_of(manifest, after, list(order))] == kinds


def test_a_change_its_reason_and_what_came_of_it(pool: GlooPool, tmp_path: Path) -> None:
    """Catches a change that is recorded at every start, a reason that makes it another run, and an
    expectation that a kill of the start in between loses.
    """
    make_corpus(tmp_path / "data", 3)
    tree = config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "run")
    ledger = tmp_path / "runs" / "run" / "ledger.jsonl"
    tree["run"] |= {"stop_after_steps": 6}
    assert pool.run(1, trainer_job, tree) == [75]
    assert of_kind(read_ledger(ledger), Change) == []

    text = "held-out loss under 99 within 2 steps"
    tree["run"] |= {"allow": ["lr.peak"], "why": "too fast", "expect": text, "stop_after_steps": 3}
    tree["lr"]["peak"] = 0.005
    assert pool.run(1, trainer_job, tree) == [75]
    (made,) = of_kind(read_ledger(ledger), Change)
    assert (made.attempt, made.step, made.why, made.expect) == (2, 6, "too fast", text)
    (peak,) = made.changes
    assert (peak.kind, peak.key, peak.before, peak.after) == ("rate", "lr.peak", "0.01", "0.005")

    # The same command again changes nothing any more; without the words it is the same run, too.
    del tree["run"]["stop_after_steps"]
    del tree["run"]["why"], tree["run"]["expect"], tree["run"]["allow"]
    assert pool.run(1, trainer_job, tree) == [0]
    entries = read_ledger(ledger)
    assert of_kind(entries, Change) == [made]
    (came,) = of_kind(entries, Outcome)
    assert (came.attempt, came.stated_step, came.due_step, came.met) == (3, 6, 8, True)
    assert came.measured_step == 10 and came.value is not None
    shown = show_run.lines_of_run(ledger.parent)
    assert "  after step 6: rate: lr.peak 0.01 -> 0.005; why: too fast" in shown
    assert f"    expected: {text} (after step 6); {came.value:.4f} at step 10: met" in shown


def test_an_expectation_alone_on_two_ranks(pool: GlooPool, tmp_path: Path) -> None:
    """Catches a first start that states nothing, and ranks that part over what rank 0 measures."""
    make_corpus(tmp_path / "data", 1)
    tree = config_tree(
        tmp_path / "data" / "manifest.json",
        tmp_path / "runs",
        "run",
        run__expect="loss over 1 within 3 steps",
        parallel__tensor=2,
    )
    assert pool.run(2, trainer_job, tree) == [0, 0]
    entries = read_ledger(tmp_path / "runs" / "run" / "ledger.jsonl")
    (stated,), (came,) = of_kind(entries, Change), of_kind(entries, Outcome)
    assert (stated.step, stated.changes, stated.why) == (0, (), None)
    assert (came.step, came.measured_step, came.met) == (3, 3, True)
