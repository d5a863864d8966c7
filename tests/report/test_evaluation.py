"""`report/evaluation.py`: catches scores at other steps, of other weights, or of no checkpoint."""

import re
from pathlib import Path
from typing import Any

from k2train.evaluation.results import TaskResult, write_result
from k2train.files import sha256_file
from k2train.report.evaluation import evaluation_figures, read_evaluations
from k2train.report.figure import render


def result(task: str, step: int, **changes: Any) -> TaskResult:
    facts: dict[str, Any] = {
        "format": 1,
        "task": task,
        "version": "1",
        "style": "default",
        "step": step,
        "checkpoint": f"ckpt_{step:03d}",
        "manifest_sha256": "a",
        "harness": "h",
        "items": 0,
        "items_sha256": "b",
        "scores": {"acc": step / 100},
        **changes,
    }
    return TaskResult.parse(facts)


def test_a_curve_has_the_score_of_each_checkpoint() -> None:
    """Catches points out of order, tasks mixed up, and a perplexity among shares."""
    results = [result("sums", step) for step in (20, 0, 10)]
    results += [result("text", step, scores={"bits_per_byte": 3 - step / 10}) for step in (0, 10)]
    shares, losses = evaluation_figures(results)
    assert [(c.name, list(c.points)) for c in shares.curves] == [
        ("sums acc", [(0, 0.0), (10, 0.1), (20, 0.2)])
    ]
    assert [(c.name, list(c.points)) for c in losses.curves] == [
        ("text bits_per_byte", [(0, 3.0), (10, 2.0)])
    ]
    html = render(shares)
    assert "Scores on tasks" in html and len(re.findall("<circle", html)) == 3
    assert ">0.1<" in html


def test_many_tasks_and_groups() -> None:
    """Catches a color that two curves share, and subjects beside their group."""
    results = [result(f"task_{n}", 5) for n in range(11)]
    results.append(result("all", 5, members=[f"task_{n}" for n in range(3)]))
    figures = evaluation_figures(results)
    assert [len(figure.curves) for figure in figures] == [8, 1]
    assert {curve.color for curve in figures[0].curves} == set(range(1, 9))
    assert figures[1].title == "Scores on tasks, 2 of 2"
    assert evaluation_figures([]) == [] and evaluation_figures([result("a", 1, scores={})]) == []


def test_scores_of_other_weights_are_left_out(tmp_path: Path) -> None:
    """Catches the score of a checkpoint that was saved again, and a page without any."""
    manifest = tmp_path / "checkpoints" / "ckpt_005" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    write_result(tmp_path, result("sums", 5, manifest_sha256=sha256_file(manifest)), [])
    # Its checkpoint was removed since.
    write_result(tmp_path, result("sums", 1), [])
    notes: list[str] = []
    assert [one.step for one in read_evaluations(tmp_path, notes)] == [1, 5] and not notes

    manifest.write_text("{ }")
    assert [one.step for one in read_evaluations(tmp_path, notes)] == [1]
    assert notes == [
        "scores on tasks of ckpt_005 left out: it was saved again since; evaluate it again"
    ]
    (tmp_path / "evaluation" / "sums" / "ckpt_001.json").write_text("{")
    notes.clear()
    assert read_evaluations(tmp_path, notes) == []
    assert notes[0].startswith("no scores on tasks: ")
