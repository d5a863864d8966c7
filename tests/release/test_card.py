"""`release/card.py`: catches scores of other weights, and numbers of another step."""

import json
import shutil
from pathlib import Path

from k2train.evaluation.results import read_results, result_paths
from k2train.release.card import card
from k2train.release.choice import Wanted
from k2train.release.index import Index
from k2train.release.stage import read_stage
from k2train.text import tokens_text
from tests.support.recorded import step_rows


def test_scores_are_of_the_weights_that_are_there(plain: Path, tmp_path: Path) -> None:
    """Catches a score of a checkpoint that was saved again since, and a metric that the report
    does not show.
    """
    run = tmp_path / "plain"
    shutil.copytree(plain, run)
    place, items = result_paths(run, "toy", "ckpt_002")
    facts = json.loads(place.read_text())
    scores, errors = {"acc": 0.875, "acc_norm": 0.25}, {"acc_norm": 0.125}
    place.write_text(json.dumps({**facts, "scores": scores, "errors": errors}))
    stale = {**facts, "checkpoint": "ckpt_003", "scores": {"acc": 0.99}}
    place.with_name("ckpt_003.json").write_text(json.dumps(stale))
    shutil.copy(items, items.with_name("ckpt_003.items.jsonl"))
    assert len(read_results(run)) == 2

    text = card("plain", [read_stage(run, Wanted(), [])], Index("plain"), {})
    assert "| `ckpt_002` | acc_norm 0.2500 (0.1250) |" in text
    assert "0.9900" not in text and "0.8750" not in text


def test_steps_and_tokens_are_of_the_same_place(plain: Path, tmp_path: Path) -> None:
    """Catches tokens of the newest checkpoint beside steps that came after it."""
    run = tmp_path / "plain"
    shutil.copytree(plain, run)
    last = step_rows(run / "metrics.jsonl")[-1]
    shutil.rmtree(run / "checkpoints" / "ckpt_003")
    text = card("plain", [read_stage(run, Wanted(), [])], Index("plain"), {})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:1] == "|"}
    assert f"| {last['step']} |" in lines["steps"]
    assert f"| {tokens_text(last['consumed_tokens'])} |" in lines["tokens"]
