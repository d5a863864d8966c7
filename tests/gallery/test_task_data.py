"""Data of evaluations: an answer under the wrong checkpoint, a missing one, the wrong metric."""

from pathlib import Path
from typing import Any

import pytest

from k2train.gallery.task_data import (
    current_results,
    letter_of,
    read_task,
    right_metric,
    task_files,
)
from tests.evaluation.test_results import result
from tests.support.tiny_gallery import choice_item, make_result, said_item


def files_of(run: Path, names: list[str] | None = None) -> dict[str, Any]:
    results, notes = current_results(run, names)
    assert notes == []
    return dict(task_files([read_task(run, results[task]) for task in sorted(results)], None))


def test_every_number_is_the_items_own(tmp_path: Path) -> None:
    """Catches numbers of another item or checkpoint, also where an item is missing in one."""
    values = {(c, n): [-1.0 - c, -2.0 - n, -3.0] for c in range(3) for n in range(70)}
    for c in range(3):
        # The middle checkpoint lacks the first item, the last one has one more.
        numbers = [n for n in range(70) if (c, n) not in ((1, 0), (0, 69), (1, 69))]
        make_result(tmp_path, "quiz", c, [choice_item(n, 0, values[c, n]) for n in numbers])
    files = files_of(tmp_path)
    facts = files["tasks"]["tasks"][0]
    assert facts["items"] == 70 and facts["metric"] == "acc" and files["tasks"]["itemsAFile"] == 50
    assert [one["step"] for one in facts["checkpoints"]] == [0, 10, 20]
    for n in range(70):
        block = files[f"task_1_item_{n // 50:04d}"][n % 50]
        text = files[f"task_1_text_{n // 50:04d}"][n % 50]
        assert text["item"] == f"item_{n}" and text["right"] == 0
        for c in range(3):
            lacks = (c, n) in ((1, 0), (0, 69), (1, 69))
            wanted = None if lacks else values[c, n]
            assert block["likelihoods"][c] == wanted
            answer = -1 if wanted is None else wanted.index(max(wanted))
            assert files["task_1"]["answers"][n][c] == answer
            letter = "-" if wanted is None else "1" if answer == 0 else "0"
            assert files["task_1"]["right"][c][n] == letter


def test_generated_texts_are_kept_once(tmp_path: Path) -> None:
    """Catches samples that are mixed up, and an answer that changed and is shown as the same."""
    said = [["4", "5"], ["4", "5"], ["5", "4"]]
    for c, texts in enumerate(said):
        make_result(tmp_path, "sums", c, [said_item(2, texts, 0.5)])
    files = files_of(tmp_path)
    answers = files["task_1"]["answers"][0]
    texts = files["task_1_text_0000"][0]["answers"]
    assert [[one["text"] for one in texts[n]] for n in answers] == said and len(texts) == 2
    assert files["task_1"]["right"] == ["h", "h", "h"]


def test_another_prompt_is_said(tmp_path: Path) -> None:
    """Catches a comparison of two checkpoints that were asked differently."""
    make_result(tmp_path, "quiz", 0, [choice_item(0, 0, [-1.0, -2.0], prompt_sha256="old")])
    make_result(tmp_path, "quiz", 1, [choice_item(0, 0, [-1.0, -2.0])])
    assert files_of(tmp_path)["task_1_item_0000"][0]["otherPrompt"] == [0]


def test_the_right_choice_is_only_said_where_it_is_known(tmp_path: Path) -> None:
    """Catches the first of two equal choices marked as right."""
    twice = choice_item(0, 0, [-1.0, -2.0], choices=(" yes", " yes"), target=" yes")
    none = choice_item(1, 0, [-1.0, -2.0], target="")
    make_result(tmp_path, "quiz", 0, [twice, none])
    assert [one["right"] for one in files_of(tmp_path)["task_1_text_0000"]] == [None, None]


def test_a_right_item_has_the_right_choice(tmp_path: Path) -> None:
    """Catches an item that counts as right by one rule, with the answer of another beside it."""
    # As the harness scores: by the sum the first choice is best, by length the second.
    scores = {"acc": 1.0, "acc_norm": 0.0}
    own = choice_item(0, 0, [-1.0, -1.5], choices=(" a", " a long one"), target=" a")
    item = own.model_copy(update={"answer": 1, "scores": scores})
    make_result(tmp_path, "quiz", 0, [item])
    files = files_of(tmp_path)
    assert files["task_1"]["answers"] == [[1]] and files["task_1"]["right"] == ["0"]
    assert files["task_1_text_0000"][0]["right"] == 0


def test_only_chosen_checkpoints(tmp_path: Path) -> None:
    """Catches --checkpoints that the evaluation does not follow."""
    for c in range(3):
        make_result(tmp_path, "quiz", c, [choice_item(0, 0, [-1.0, -2.0])])
    facts = files_of(tmp_path, ["ckpt_000", "ckpt_002"])["tasks"]["tasks"][0]
    assert [one["name"] for one in facts["checkpoints"]] == ["ckpt_000", "ckpt_002"]


@pytest.mark.parametrize(
    "scores, metric, letter",
    (
        ({"acc": 1, "acc_norm": 0}, "acc_norm", "0"),
        ({"exact_match,strict": 0, "exact_match,flexible": 1}, "exact_match,strict", "0"),
        ({"bits_per_byte": 0.9}, None, "-"),
        ({"acc_norm": 0, "brier": 1}, "acc_norm", "0"),
        ({"f1": 0.4}, "f1", "h"),
        ({"likelihood": -31.5}, "likelihood", "-"),
        ({}, None, "-"),
    ),
)
def test_right_by_the_main_metric(
    scores: dict[str, float], metric: str | None, letter: str
) -> None:
    """Catches a loss below 1 that counts as partly right, and another metric than the tables'."""
    assert right_metric(result(scores=scores)) == metric
    assert letter_of(scores, metric) == letter
