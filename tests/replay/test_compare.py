"""What a replay compares beside the numbers of a step, and a record that lacks a row."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k2train.errors import RunError
from k2train.parallel.device_digest import StateRoot
from k2train.record.metrics import RootRecord, StepRecord
from k2train.replay.compare import Differences, known_root, roots_apart
from k2train.replay.recorded_run import RecordedRun
from k2train.state_digest import short_digests

ROW = StepRecord(8, 1, consumed_tokens=512, state_root="aa", update_norm=0.5)
ROOT = RootRecord(8, 1, root="aa")


def test_every_number_of_a_metrics_row_counts() -> None:
    """Catches tokens or an update norm that were changed, and a blame of what is not recorded."""
    for row, words in (
        (ROW, ""),
        (replace(ROW, consumed_tokens=0, update_norm=None), ""),
        (replace(ROW, consumed_tokens=513), "step 8 has consumed_tokens 512, recorded 513"),
        (replace(ROW, update_norm=0.25), "step 8 has update_norm 0.5, recorded 0.25"),
    ):
        found = Differences()
        found.metrics(row, 512, 0.5)
        assert [text for _, text in found.found] == ([words] if words else [])
    found = Differences()
    found.metrics(ROW, 512, None)
    assert not found.found, "computed on another layout"


def test_digests_count_under_a_root_that_is_right() -> None:
    """Catches digests that were changed beside the root of a state that was not."""
    now = StateRoot("aa", {"a.master": "12" * 32, "b.master": "34" * 32}, torch.zeros(0))
    whole = short_digests(now.digests)
    found = Differences()
    found.root(8, whole, now, "aa")
    found.root(8, {}, now, "aa")
    assert not found.found, "no digest is on record in older files"
    found.root(8, {**whole, "b": "00"}, now, "aa")
    assert [text.rpartition(": ")[2] for _, text in found.found] == ["b differ"]


def test_both_records_of_a_root_count() -> None:
    """Catches a root that was changed in one of two files, and one of a step that was undone."""
    assert roots_apart(ROW, ROOT) == ""
    assert "aa in metrics.jsonl, bb in state" in roots_apart(ROW, replace(ROOT, root="bb"))
    undone = replace(ROOT, attempt=0, root="bb", tensors={"a": "1"})
    assert roots_apart(ROW, undone) == ""
    assert known_root(ROW, undone) == ("aa", {})
    assert known_root(replace(ROW, state_root=None), undone) == ("", {})
    assert known_root(replace(ROW, state_root=None), ROOT) == ("aa", {})


def test_a_row_that_was_taken_out_is_named() -> None:
    run = RecordedRun(Path("run"), (), {8: ROW}, {})
    assert run.row(8) is ROW
    with pytest.raises(RunError, match="no row of step 7: it was taken out"):
        run.row(7)
