"""`evaluation/harness.py`: catches results that count although something else was asked."""

import shutil
from pathlib import Path

import pytest

from k2train.errors import ConfigError, DataError
from k2train.evaluation.harness import LoadedTask, load_tasks, split_scores
from k2train.evaluation.selection import Wanted, select_tasks


def loaded(
    folder: Path, name: str, shots: int | None = None, limit: int | None = None
) -> LoadedTask:
    wanted, _ = select_tasks(name, shots, [folder])
    return load_tasks(wanted, limit, [])[0][0]


def test_what_a_task_asks_has_a_hash(tasks: Path, tmp_path: Path) -> None:
    """Catches a hash of the place of the data, and one that other shots, items or data leave."""
    known = loaded(tasks, "drawn")
    again = loaded(tasks, "drawn")
    assert again.requests_sha256 == known.requests_sha256
    copy = tmp_path / "elsewhere"
    shutil.copytree(tasks, copy)
    moved = loaded(copy, "drawn")
    assert moved.requests_sha256 == known.requests_sha256
    assert moved.definition_sha256 == known.definition_sha256

    file = copy / "questions.jsonl"
    file.write_text(file.read_text().replace("on the mat", "on a mat"))
    others = {
        loaded(copy, "drawn").requests_sha256,
        loaded(tasks, "drawn", limit=3).requests_sha256,
    }
    yaml = copy / "drawn.yaml"
    yaml.write_text(yaml.read_text().replace('"num_fewshot": 2', '"num_fewshot": 1'))
    others.add(loaded(copy, "drawn").requests_sha256)
    assert len(others) == 3 and known.requests_sha256 not in others
    assert loaded(copy, "drawn").definition_sha256 != known.definition_sha256


def test_shots_are_those_that_were_drawn(tasks: Path) -> None:
    """Catches shots of another item, and an id that stays when the harness draws others."""
    task = loaded(tasks, "drawn")
    assert task.num_shots == 2 and task.shots == ()
    assert len({task.shots_of(number) for number in range(6)}) > 1
    fixed = loaded(tasks, "fixed")
    assert fixed.shots == ("shots/0",) and fixed.num_shots == 1
    assert loaded(tasks, "questions").shots == ()


def test_scores_and_errors() -> None:
    """Catches a standard error as a score, and "N/A" as one."""
    metrics = {
        "alias": "a",
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
        "exact_match,strict": 1,
        "exact_match_stderr,strict": "N/A",
        "sample_len": 3,
        "x,none": float("nan"),
    }
    assert split_scores(metrics) == ({"acc": 0.5, "exact_match,strict": 1.0}, {"acc": 0.25})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('"output_type": "multiple_choice"', '"output_type": "guess"'), r"drawn\.yaml: "),
        (('"num_fewshot": 2', '"num_fewshot": 40'), "cannot be rendered with 40 shots"),
        (('"questions.jsonl"', '"none.jsonl"'), r"its data file .*none\.jsonl is not there"),
        (('"test_split"', '"unsafe_code": true, "test_split"'), "programs to run, which needs a"),
        (("{{q}}", "{{ q"), "drawn: its items cannot be rendered|drawn.yaml: "),
        (("{{q}}", "{{ q.none.less }}"), r"drawn\.yaml: .*no attribute 'none'"),
        (('"doc_to_text"', '"doc_to_txt"'), r"drawn\.yaml: .*doc_to_txt"),
        (('"answer"', '"anser"'), "item 0: its right answer 'anser' is none of its 4 choices"),
        (('"metric": "acc"', '"metric": "acurracy"'), "unknown metric acurracy; n"),
    ],
)
def test_a_task_that_is_wrong(
    tasks: Path, tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    """Catches a traceback of the harness."""
    copy = tmp_path / "tasks"
    shutil.copytree(tasks, copy)
    yaml = copy / "drawn.yaml"
    yaml.write_text(yaml.read_text().replace(*change))
    with pytest.raises((ConfigError, DataError), match=says) as caught:
        loaded(copy, "drawn")
    assert "\n" not in str(caught.value)


def test_a_broken_line_of_data(tasks: Path, tmp_path: Path) -> None:
    """Catches a traceback of the reader, and a line that only says that it failed."""
    copy = tmp_path / "tasks"
    shutil.copytree(tasks, copy)
    with (copy / "questions.jsonl").open("a") as stream:
        stream.write('{"q": "cut off')
    with pytest.raises((ConfigError, DataError), match=r"drawn.*JSON") as caught:
        loaded(copy, "drawn")
    assert "\n" not in str(caught.value)


def test_an_answer_that_cannot_be_scored(tasks: Path) -> None:
    """Catches a traceback of a task's own code, hours into an evaluation."""
    with pytest.raises(ConfigError, match=r"--tasks drawn: an answer cannot be scored \("):
        loaded(tasks, "drawn").task.process_results({"no": "question"}, [])


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and advice without the tasks that are here."""

    class Known:
        all_tasks = ("arc_easy",)

    monkeypatch.setattr("k2train.evaluation.harness.own_tasks", Known)
    with pytest.raises(ConfigError, match=r"--tasks arc: neither a local task \(demo\) nor one of"):
        load_tasks([Wanted("arc")], None, ["demo"])
