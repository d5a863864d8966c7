"""`evaluation/selection.py`: catches other checkpoints or tasks than the words say."""

from pathlib import Path

import pytest

from k2train.errors import ConfigError
from k2train.evaluation.selection import local_names, read_yaml, select_tasks

ROOT = Path(__file__).resolve().parents[2]


def test_tasks_and_lists(tmp_path: Path) -> None:
    """Catches shots of a list that an option replaces, and a local task taken for another."""
    (tmp_path / "mine.yaml").write_text("task: mine\nnum_fewshot: 4\nmetadata: {style: letters}\n")
    (tmp_path / "both.yaml").write_text(
        "tasks:\n  - {task: mine, style: own}\n  - {task: arc_easy, shots: 5, label: ARC}\n"
        "  - {task: humaneval, generates_code: true}\n"
    )
    wanted, code = select_tasks("both, piqa", 2, [tmp_path])
    assert [(one.task, one.shots, one.style, one.label) for one in wanted] == [
        ("mine", 4, "own", ""),
        ("arc_easy", 5, "default", "ARC"),
        ("piqa", 2, "default", ""),
    ]
    assert code == ["humaneval"] and wanted[0].file == tmp_path / "mine.yaml"
    assert select_tasks(str(tmp_path / "mine.yaml"), None, [])[0][0].style == "letters"
    assert local_names([tmp_path]) == ["both", "mine"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "is not valid YAML"),
        ("a: 1", "neither the key task"),
        ("task: a/b", "must be a name of letters"),
        ("tasks: []", "must be a list of entries"),
        ("tasks: [{shots: 1}]", "entry 1 must have the key task"),
        ("tasks: [{task: a}, {task: b, shot: 1}]", "entry 2 has the unknown key shot; known are"),
        ("tasks: [{task: a, shots: -1}]", "shots must be a whole number from 0, is -1"),
        ("tasks: [{task: a}, {task: a}]", "a is named twice"),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, says: str) -> None:
    """Catches a traceback, and a list that is read in part."""
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        select_tasks("wrong", None, [tmp_path])
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"none\.yaml: "):
        select_tasks("none.yaml", None, [])


def test_the_shipped_lists() -> None:
    """Catches a task of a list without a file, and shots that are not those published."""
    folder = ROOT / "configs" / "tasks"
    wanted, code = select_tasks("demo", None, [folder])
    assert all(one.file is not None for one in wanted) and not code
    for name in set(local_names([folder])) - {"demo", "k2_table2"}:
        assert read_yaml(folder / f"{name}.yaml")["task"] == name

    wanted, code = select_tasks("k2_table2", None, [folder])
    shots = {one.task: one.shots for one in wanted}
    assert shots.items() >= {"hellaswag": 10, "arc_challenge": 25, "gsm8k": 5, "mmlu": 0}.items()
    # Of tasks with two styles each counts once.
    assert len({one.label for one in wanted}) + len(code) == 21
