"""`evaluation/contamination_items.py`: catches parts of items that are never searched, and worked
examples that are searched with them.
"""

import json
from pathlib import Path

import pytest

from k2train.errors import DataError
from k2train.evaluation.contamination_items import (
    SearchedItem,
    items_of_result,
    read_test_items,
    without_shots,
)
from k2train.evaluation.results import Item
from tests.evaluation.test_results import result

QUESTIONS = ("Q: one plus\n\none?\nA:", "Q: two?\nA:", "Q: three, four?\nA:")
SHOTS = "Answer these.\n\nQ: nine?\nA: 9\n\nQ: ten?\nA: 10\n\n"


def test_the_parts_of_an_item() -> None:
    """Catches a part that is left out, or searched twice."""
    one = SearchedItem("x", "Q: two?\nA:", " 2", (" 1", " 2", " "))
    assert list(one.parts()) == [
        ("prompt", "Q: two?\nA:"),
        ("target", " 2"),
        ("prompt and answer", "Q: two?\nA: 2"),
        ("choice 0", " 1"),
    ]
    assert list(SearchedItem("y", "", "a text").parts()) == [("target", "a text")]


def test_worked_examples_are_cut_off() -> None:
    """Catches examples that make every item of a task contaminated at once."""
    prompts = [SHOTS + question for question in QUESTIONS]
    assert without_shots(prompts, 2) == list(QUESTIONS)
    # Each item has its own: only what is behind the last blank line is surely its own.
    own = [f"Q: {n}?\nA: {n}\n\n{question}" for n, question in enumerate(QUESTIONS)]
    assert without_shots(own, 1) == ["one?\nA:", *QUESTIONS[1:]]
    assert without_shots([SHOTS + QUESTIONS[1]], 2) == [QUESTIONS[1]]


def test_items_of_a_result() -> None:
    """Catches an item under another name, and examples that stay or go wrongly."""
    items = [
        Item(
            item=str(number),
            prompt_sha256="a" * 64,
            prompt=SHOTS + question,
            target=" 2",
            choices=(" 2",),
        )
        for number, question in enumerate(QUESTIONS)
    ]
    found = items_of_result(result(num_shots=2), items)
    assert found[1] == SearchedItem("1", QUESTIONS[1], " 2", (" 2",))
    assert items_of_result(result(), items)[1].prompt == SHOTS + QUESTIONS[1]


def test_a_file_of_items(tmp_path: Path) -> None:
    """Catches a line that is skipped, and names that are not the file's."""
    path = tmp_path / "items.jsonl"
    rows = [
        {"task_id": "a", "prompt": "p", "target": "t", "choices": ["c"]},
        {"id": 7, "prompt": "q"},
        {"prompt": "r"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_test_items(path, None) == [
        SearchedItem("a", "p", "t", ("c",)),
        SearchedItem("7", "q"),
        SearchedItem("3", "r"),
    ]
    path.write_text('{"question": "why"}\n')
    assert read_test_items(path, "question") == [SearchedItem("1", "why")]


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("{", "line 1: is not JSON"),
        ("[]", "line 1: must be an object"),
        ('{"question": "a"}', "has no text under 'prompt'; it has question"),
        ('{"prompt": "a", "choices": "b"}', "choices a list of texts"),
        ('{"prompt": "a", "choices": [1]}', "choices must be a list of texts"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "two items are named '1'"),
        ("", "has no item"),
    ),
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    """Catches items that are left out without a word."""
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as raised:
        read_test_items(path, None)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(DataError, match="cannot be read"):
        read_test_items(tmp_path / "none", None)
