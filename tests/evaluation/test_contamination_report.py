"""`evaluation/contamination_report.py` and its tool: catches a table and a file that
say something else than what was found.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from k2train.evaluation.contamination_report import write_facts
from k2train.evaluation.results import Item, read_results, write_result
from k2train.files import alone_in, sha256_file
from tests.evaluation.test_contamination import ANSWER, PLACES, WRONG, A, C, D, E, F, H
from tests.evaluation.test_results import result
from tests.support.command_line import load_tool
from tests.support.contaminated_run import Planted, plant, words

pytest.importorskip("pydivsufsort", reason="the extra `trace` is not installed")

tool = load_tool("contamination")
TEXTS = {"0": A, "1": C, "2": H, "3": E, "4": F, "5": D, "6": words(93, 24)}
SCORES = {0: "0010010", 4: "1010010", 6: "1110000"}
"""Correct answers of the items, by the step of the checkpoint."""


def items(scores: str) -> list[Item]:
    return [
        Item(
            item=name,
            prompt_sha256=name * 64,
            prompt=f"Answer.\n\n{text}",
            target=ANSWER if name == "2" else " no",
            choices=(ANSWER, WRONG) if name == "2" else (" no", " yes"),
            scores={"acc": int(value)},
        )
        for (name, text), value in zip(TEXTS.items(), scores, strict=True)
    ]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    made = plant(tmp_path_factory.mktemp("report"), PLACES)
    for step, scores in SCORES.items():
        name = f"ckpt_{step // 2:03d}"
        own = result(task="quiz", step=step, checkpoint=name, num_shots=1, scores={"acc": 0.5})
        write_result(made.run, own, items(scores))
    return made


def told(run: Path, capsys: Any, *more: str) -> str:
    assert tool.main([str(run), *more]) == 0
    shown: str = capsys.readouterr().out
    return shown


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_table(planted: Planted, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a count, place or step beside another item, and scores of the wrong group."""
    shown = rows(told(planted.run, capsys, "--tasks", "quiz"))
    assert ["exposed", "3", "1", "covered", "from", "80%"] in shown
    assert ["partly", "1", "0", "20%", "or", "more"] in shown
    assert ["clean", "3", "0", "less"] in shown
    found = {line[0]: line for line in shown if line and line[0] in TEXTS}
    assert found["0"][-4:] == ["chunk_000", "1", "1", "1"]
    assert found["1"][-4:] == ["chunk_001", "2", "7", "1"]
    assert found["2"][-5:] == ["with", "chunk_003", "4", "6", "1"]
    # The step of an item that is to come is none, its place is shown.
    assert found["5"][-4:] == ["chunk_001", "5", "-", "1"]
    assert "to come" not in found and " ".join(found["5"]).count("not trained yet") == 1
    assert "4" not in found and "6" not in found

    scores = {line[0]: line for line in shown if line and line[0].startswith("ckpt_")}
    # Item 0 at step 1, item 2 at step 6, item 1 at step 7, of which there is no result.
    assert [scores[name][2:5] for name in ("ckpt_000", "ckpt_002", "ckpt_003")] == [
        ["0", "of", "3"],
        ["1", "of", "3"],
        ["2", "of", "3"],
    ]
    assert scores["ckpt_000"][5] == "0.333" and scores["ckpt_003"][5] == "1.000"


def test_the_file_of_a_run(planted: Planted, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a file that differs from what is printed, holds test items itself, or breaks the
    reading of results.
    """
    (printed,) = told(planted.run, capsys, "--tasks", "all", "--json").splitlines()
    path = planted.run / "evaluation" / "contamination.json"
    text = path.read_text()
    facts = json.loads(text)
    assert facts == json.loads(printed)
    assert not any(word in text for word in (A, C.split()[3], H))
    assert (facts["format"], facts["run"], facts["step"]) == (1, "planted", 7)
    assert len(read_results(planted.run)) == len(SCORES)

    (task,) = facts["tasks"]
    assert task["counts"] == {"exposed": 3, "partly": 1, "clean": 3, "too short": 0}
    found = {one["item"]: one for one in task["found"]}
    assert {name: one["step"] for name, one in found.items()} == {
        "0": 1,
        "1": 7,
        "2": 6,
        "3": None,
        "5": None,
    }
    (hit,) = found["1"]["parts"][0]["hits"]
    uses = hit["rows"][0]["exposures"]
    assert [(one["state"], one["step"], one["attempt"]) for one in uses] == [
        ("undone", 3, 1),
        ("trained", 7, 2),
    ]
    assert task["scores"]["pairs"] == [
        {"before": "ckpt_000", "after": "ckpt_002", "exposed": 1},
        {"before": "ckpt_002", "after": "ckpt_003", "exposed": 1},
    ]
    assert task["scores"]["exposed_change"] == {"items": 2, "mean": 0.5, "error": 0.5}


def test_results_of_other_prompts_are_left_out(
    planted: Planted, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Catches a change of prompt told as a change of the model."""
    changed = [one.model_copy(update={"prompt_sha256": "f" * 64}) for one in items("1111111")]
    own = result(task="quiz", step=2, checkpoint="ckpt_001", num_shots=1)
    place = write_result(planted.run, own, changed)
    try:
        shown = told(planted.run, capsys, "--tasks", "quiz", "--to", str(tmp_path / "x.json"))
    finally:
        place.unlink()
    assert "note: ckpt_001 was asked other prompts and is left out" in shown
    assert not any(line[:1] == ["ckpt_001"] for line in rows(shown))


def test_items_of_a_file(
    planted: Planted, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Catches a file of the run that is overwritten by another search."""
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"id": k, "prompt": v}) + "\n" for k, v in TEXTS.items()))
    before = (planted.run / "evaluation" / "contamination.json").read_bytes()
    shown = rows(told(planted.run, capsys, "--items", str(path)))
    assert ["exposed", "3", "0", "covered", "from", "80%"] in shown
    shown = rows(told(planted.data, capsys, "--items", str(path)))
    assert ["exposed", "4", "0", "covered", "from", "80%"] in shown
    assert (planted.run / "evaluation" / "contamination.json").read_bytes() == before
    to = tmp_path / "found.json"
    told(planted.run, capsys, "--items", str(path), "--to", str(to))
    assert json.loads(to.read_text())["tasks"][0]["counts"]["exposed"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (["--tasks", "none"], "has no result of 'none'; it has quiz"),
        (["--items", "none.jsonl"], "none.jsonl cannot be read"),
        (["--tasks", "quiz", "--metric", "f1"], "--metric (f1): the items have acc"),
        (["--tasks", "quiz", "--exposed", "2"], "--exposed (2), which is at most 1"),
        (["--tasks", "quiz", "--to", "no/such/folder/x.json"], "name another with --to"),
    ),
)
def test_a_mistake_is_one_line(
    planted: Planted, options: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback."""
    assert tool.main([str(planted.run), *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_scores_of_other_weights_are_left_out(
    planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a change that is that between two branches of the run."""
    run = tmp_path / "planted"
    shutil.copytree(planted.run, run)
    for name in ("ckpt_002", "ckpt_003"):
        folder = run / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(f"{name} as it is now")
        place = run / "evaluation" / "quiz" / f"{name}.json"
        if name == "ckpt_003":
            own = json.loads(place.read_text())
            own["manifest_sha256"] = sha256_file(folder / "manifest.json")
            place.write_text(json.dumps(own))
    assert tool.main([str(run), "--tasks", "quiz"]) == 0
    shown = capsys.readouterr()
    names = [line[0] for line in rows(shown.out) if line and line[0].startswith("ckpt_")]
    assert names == ["ckpt_000", "ckpt_003"]
    assert "ckpt_002 on quiz left out: it was saved again since" in shown.err


def test_two_that_write_one_file_wait_for_each_other(tmp_path: Path) -> None:
    """Catches a search of minutes that ends with the temporary file of another one."""
    place = tmp_path / "contamination.json"
    other = Thread(target=write_facts, args=(place, {"step": 1}))
    with alone_in(tmp_path):
        other.start()
        other.join(0.1)
        assert not list(tmp_path.iterdir())
    other.join()
    assert json.loads(place.read_text()) == {"step": 1}
