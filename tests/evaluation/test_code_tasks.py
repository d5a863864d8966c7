"""`evaluation/code_tasks.py`: catches wrong programs, and problems that are not the file's."""

import hashlib
import json
from pathlib import Path

import pytest

from k2train.errors import DataError
from k2train.evaluation.code_sandbox import Outcome, Sandbox
from k2train.evaluation.code_tasks import (
    Problem,
    completion_of,
    item_of,
    read_problems,
    scores_of,
)

DEMO = Path(__file__).resolve().parents[2] / "configs/tasks/python_small.jsonl"
GOOD = {"task_id": "a/0", "prompt": "def f():\n", "test": "def check(c): c()", "entry_point": "f"}


def test_the_demos_problems_are_sound() -> None:
    """Catches a problem whose own solution fails, and a test that anything passes."""
    found = read_problems(DEMO)
    assert found.task == "python_small" and len(found.problems) == 8
    assert found.sha256 == hashlib.sha256(DEMO.read_bytes()).hexdigest()
    sandbox = Sandbox.open(allow_weak=True)
    right = [one.program(one.canonical_solution) for one in found.problems]
    assert [outcome.kind for outcome in sandbox.run_all(right, 4)] == ["passed"] * 8
    for answer in ("    return None\n", "    pass", "", "    return 1 / 0"):
        wrong = [one.program(answer) for one in found.problems]
        assert not any(outcome.passed for outcome in sandbox.run_all(wrong, 4)), answer


@pytest.mark.parametrize(
    ("text", "kept"),
    (
        ("    return 1\n\ndef other():\n    pass", "    return 1\n"),
        ("    return 1\nprint(f())", "    return 1"),
        ("    if x:\n        return 1\n    # why\n    return 2\n# end", None),
        ("    return 1", "    return 1"),
        ("", ""),
    ),
)
def test_a_completion_ends_with_its_function(text: str, kept: str | None) -> None:
    """Catches a second function that is run, and a body that is cut at an inner line."""
    assert completion_of(text) == (text[: text.index("\n# end")] if kept is None else kept)


def test_the_result_of_a_problem() -> None:
    """Catches a count of other samples, and an answer that is not the one that was run."""
    problem = Problem.parse({**GOOD, "canonical_solution": "    return 3\n"})
    kinds = ("passed", "failed", "time", "passed")
    item = item_of(problem, list("abcd"), [Outcome(kind) for kind in kinds], [1, 2])
    assert (item.item, item.prompt, item.target) == ("a/0", "def f():\n", "    return 3\n")
    assert item.generated == tuple("abcd")
    assert item.scores == {
        "pass@1": 0.5,
        "pass@2": pytest.approx(5 / 6),
        "samples": 4,
        "samples_failed": 1,
        "samples_passed": 2,
        "samples_time": 1,
    }
    none = item_of(problem, list("ab"), [Outcome("failed")] * 2, [1, 2])
    scores, errors = scores_of([item, none], [1, 2])
    assert scores == {"pass@1": 0.25, "pass@2": pytest.approx(5 / 12)}
    assert errors["pass@1"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("lines", "message"),
    (
        (["{"], "line 1: "),
        ([json.dumps(GOOD), "[]"], "line 2: must be an object"),
        ([json.dumps({**GOOD, "test": 3})], "line 1: key 'test' must be text"),
        ([json.dumps({k: v for k, v in GOOD.items() if k != "prompt"})], "'prompt' is missing"),
        ([json.dumps({**GOOD, "entry_point": "f(); g"})], "is no name of a function"),
        ([json.dumps({**GOOD, "prompt": " "})], "prompt is empty"),
        ([json.dumps(GOOD)] * 2, "line 2: task_id a/0 is there twice"),
        ([""], "has no problem"),
    ),
)
def test_a_wrong_file_is_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    """Catches a problem that is left out without a word."""
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as raised:
        read_problems(path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_names_and_files_that_cannot_be_used(tmp_path: Path) -> None:
    """Catches a task's name that leads out of the folder of results."""
    path = tmp_path / "problems.jsonl"
    with pytest.raises(DataError, match="cannot be read"):
        read_problems(path)
    path.write_text(json.dumps(GOOD) + "\n")
    assert read_problems(path, "mine").task == "mine"
    for name in ("../up", "a/b", ".hidden", "-x"):
        with pytest.raises(DataError, match="--task"):
            read_problems(path, name)
