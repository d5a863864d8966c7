"""`evaluation/scores.py`: catches another metric as the main one, and scores in other cells."""

from typing import Any

from k2train.evaluation.results import TaskResult
from k2train.evaluation.scores import MEMBERS, main_metric, shown, table_lines, title_of


def result(task: str, checkpoint: str, step: int, **changes: Any) -> TaskResult:
    facts: dict[str, Any] = {
        "format": 1,
        "task": task,
        "version": "1",
        "style": "default",
        "step": step,
        "checkpoint": checkpoint,
        "manifest_sha256": "a",
        "harness": "h",
        "items": 4,
        "items_sha256": "b",
        "scores": {"acc": 0.5, "acc_norm": 0.25},
        "errors": {"acc_norm": 0.125},
        **changes,
    }
    return TaskResult.parse(facts)


def test_main_metric() -> None:
    """Catches a score behind a filter that is missed, and a result without any."""
    assert main_metric(result("a", "c", 0)) == "acc_norm"
    filtered = {"exact_match,flexible": 0.5, "exact_match,strict": 0.25}
    assert main_metric(result("a", "c", 0, scores=filtered)) == "exact_match,flexible"
    assert main_metric(result("a", "c", 0, scores={"bleu": 3.0})) == "bleu"
    assert main_metric(result("a", "c", 0, scores={})) is None


def test_table() -> None:
    """Catches checkpoints out of order, a missing cell, and members beside their group."""
    results = [
        result("sums", "ckpt_002", 10, num_shots=2, style="letters", label="Sums"),
        result("sums", "ckpt_000", 0, num_shots=2, style="letters", label="Sums"),
        result("part", "ckpt_000", 0),
        result("all", "ckpt_000", 0, members=["part"], scores={"acc": 1.0}, errors={}),
    ]
    assert title_of(results[0]) == "Sums (2-shot, letters)"
    assert [one.task for one in shown(results)] == ["sums", "sums", "all"]
    lines = [line.split("  ") for line in table_lines(results)]
    assert [[cell.strip() for cell in line if cell] for line in lines] == [
        ["checkpoint", "step", "Sums (2-shot, letters) acc_norm", "all acc"],
        ["ckpt_000", "0", "0.2500 ± 0.1250", "1.0000"],
        ["ckpt_002", "10", "0.2500 ± 0.1250", "-"],
    ]
    assert table_lines([]) == []


def test_a_group_of_other_members_is_left_out() -> None:
    """Catches the score of a group that hides a member which was evaluated otherwise since."""
    own = {MEMBERS: {"part": "b"}}
    group = result("all", "ckpt_000", 0, members=["part"], settings=own)
    now = result("part", "ckpt_000", 0)
    since = result("part", "ckpt_000", 0, items_sha256="c", num_shots=5)
    later = result("part", "ckpt_002", 10, items_sha256="c")
    assert shown([now, group, later]) == [group, later]
    assert shown([since, group]) == [since]
