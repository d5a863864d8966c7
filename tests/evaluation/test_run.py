"""`evaluation/run.py`: catches results of other weights or items, and work that is done twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from k2train.checkpoint.selection import chosen
from k2train.errors import CheckpointError, DataError, UnavailableError
from k2train.evaluation import run as evaluation
from k2train.evaluation.results import TaskResult, read_items, read_result, read_results
from k2train.evaluation.run import Request, evaluate_run
from k2train.evaluation.scores import MEMBERS
from k2train.evaluation.selection import select_tasks
from k2train.inference import session
from k2train.launch.environment import Launch
from tests.support.gloo_pool import GlooPool

ALONE = Launch(0, 1, 0, False)


def request(run: Path, tasks: Path, names: str, which: str = "2", **changes: Any) -> Request:
    wanted, _ = select_tasks(names, None, [tasks])
    return Request(run, chosen(run, which), wanted, batch=3, **changes)


def done(asked: Request) -> tuple[list[TaskResult], list[str]]:
    said: list[str] = []
    return evaluate_run(asked, ALONE, said.append), said


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """The run, without results."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(run / "checkpoints")
    return tmp_path / "run"


def grid_job(launch: Launch, asked: Request) -> list[dict[str, Any]]:
    # The pool's workers have their process group.
    with (
        patch.object(session, "start_process_group"),
        patch.object(session, "stop_process_group"),
    ):
        return [one.model_dump() for one in evaluate_run(asked, launch, lambda _: None)]


@pytest.fixture(scope="module")
def alone(
    run: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[TaskResult]]:
    """A run whose last two checkpoints are evaluated on one process, and the results."""
    base = tmp_path_factory.mktemp("alone")
    (base / "checkpoints").symlink_to(run / "checkpoints")
    return base, done(request(base, tasks, "drawn,texts,answers", "1,2"))[0]


def test_a_result_says_what_it_was_made_from(alone: Any, tasks: Path) -> None:
    """Catches scores under another checkpoint, shots without names, and a prompt without hash."""
    base, results = alone
    assert read_results(base) == sorted(results, key=lambda one: (one.task, one.step))
    by_name = {(one.task, one.checkpoint): one for one in results}
    assert {one.step for one in results if one.checkpoint == "ckpt_002"} == {10}
    drawn = by_name["drawn", "ckpt_002"]
    assert drawn.num_shots == 2 and drawn.shots == () and drawn.version == "1.0"
    assert drawn.harness.startswith("lm-eval 0.") and drawn.settings["precision"] == "fp32"
    items = read_items(base, drawn)
    assert len(items) == 6 and {len(one.shots) for one in items} == {2}
    rows = [json.loads(line) for line in (tasks / "shots.jsonl").read_text().splitlines()]
    for item in items:
        for shot in item.shots:
            row = rows[int(shot.removeprefix("shots/"))]
            assert row["q"] + row["choices"][row["answer"]] in item.prompt
    old = by_name["drawn", "ckpt_001"]
    assert old.manifest_sha256 != drawn.manifest_sha256
    assert [one.prompt_sha256 for one in read_items(base, old)] == [
        one.prompt_sha256 for one in items
    ]
    assert read_items(base, old) != items


def test_scores_are_those_of_the_items(alone: Any) -> None:
    """Catches a mean over other items than those written, and an answer by another rule."""
    base, results = alone
    for one in results:
        if one.task != "drawn":
            continue
        items = read_items(base, one)
        for metric in ("acc", "acc_norm"):
            mean = sum(item.scores[metric] for item in items) / len(items)
            assert one.scores[metric] == pytest.approx(mean)
        for item in items:
            assert item.answer is not None
            answer = item.choices[item.answer]
            assert (answer == item.target) == (item.scores["acc_norm"] == 1)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_a_grid_gives_the_results_of_one_process(
    pool: GlooPool, alone: Any, own: Path, tasks: Path, tensor: int, pipeline: int
) -> None:
    """Catches items lost or doubled between replicas, logits of a part of the vocabulary, and
    scores of a stage that has none.
    """
    base, _ = alone
    asked = request(own, tasks, "drawn,texts,answers", "2", tensor=tensor, pipeline=pipeline)
    ranks = pool.run(4, grid_job, asked)
    strip = {"items_sha256"}
    first = [{k: v for k, v in one.items() if k not in strip} for one in ranks[0]]
    for other in ranks[1:]:
        assert [{k: v for k, v in one.items() if k not in strip} for one in other] == first

    for one in read_results(own):
        known = next(r for r in read_results(base) if (r.task, r.step) == (one.task, one.step))
        assert one.scores == pytest.approx(known.scores, rel=1e-5)
        assert evaluation._difference(one, known) == ""
        for item, same in zip(read_items(own, one), read_items(base, known), strict=True):
            assert item.prompt == same.prompt and item.generated == same.generated
            assert item.log_likelihoods == pytest.approx(same.log_likelihoods, rel=1e-5)
            assert item.answer == same.answer


def blind_job(launch: Launch, asked: Request) -> list[str]:
    # A rank that does not see what rank 0 sees.
    with patch.object(evaluation, "exists_retried", lambda path: launch.rank == 0):
        return [one["task"] for one in grid_job(launch, asked)]


def refused_job(launch: Launch, asked: Request) -> str:
    try:
        return str(grid_job(launch, asked))
    except UnavailableError as error:
        return str(error)


def test_ranks_agree_on_what_the_disk_says(
    pool: GlooPool, alone: Any, tasks: Path, own: Path
) -> None:
    """Catches ranks that leave alone, and the others that wait for them."""
    (own / "evaluation").write_text("no folder")
    told = pool.run(2, refused_job, request(own, tasks, "texts", "2"))
    assert len(set(told)) == 1 and "evaluation cannot be written: " in told[0], told

    base, _ = alone
    (own / "evaluation").unlink()
    shutil.copytree(base / "evaluation", own / "evaluation")
    assert (
        pool.run(2, blind_job, request(own, tasks, "drawn,texts", "2")) == [["drawn", "texts"]] * 2
    )


def test_what_exists_is_not_done_again(
    alone: Any, tasks: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a second evaluation of the same, and none where something has changed."""
    base, results = alone
    shutil.copytree(base / "evaluation", own / "evaluation")
    asked = request(own, tasks, "texts", "2")
    assert done(asked)[1] == []
    limited, said = done(replace(asked, limit=2))
    assert "made again, limit changed" in said[0] and limited[0].items == 2

    # Other data under the same version.
    mine = tmp_path / "tasks"
    shutil.copytree(tasks, mine)
    (mine / "texts.jsonl").write_text('{"text": "a dog"}\n{"text": "the cat"}\n')
    found, said = done(replace(request(own, mine, "texts", "2"), limit=2))
    assert "requests_sha256 changed" in said[0] and found[0].scores != limited[0].scores

    # Other weights under the same name.
    place = own / "evaluation" / "texts" / "ckpt_002.json"
    mine_sha = found[0].manifest_sha256
    place.write_text(place.read_text().replace(mine_sha, "f" * 64))
    again, said = done(replace(request(own, mine, "texts", "2"), limit=2))
    assert "manifest_sha256 changed" in said[0] and again[0].manifest_sha256 == mine_sha

    # Damage of the items is seen, and mended.
    path = own / "evaluation" / "texts" / "ckpt_002.items.jsonl"
    path.write_text(path.read_text().replace("a dog", "a cat"))
    assert "made again: " in done(replace(request(own, mine, "texts", "2"), limit=2))[1][0]

    # A kill before the second task is written: the first one is whole, and counts.
    class Killed(BaseException):
        pass

    write = evaluation.write_result

    def killed(run: Path, result: TaskResult, items: Any) -> Path:
        if result.task == "texts":
            raise Killed
        return write(run, result, items)

    monkeypatch.setattr(evaluation, "write_result", killed)
    shutil.rmtree(own / "evaluation")
    two = request(own, tasks, "fixed,texts", "2")
    with pytest.raises(Killed):
        done(two)
    assert [one.task for one in read_results(own)] == ["fixed"]
    assert read_results(own)[0].shots == ("shots/0",)
    monkeypatch.undo()
    results, said = done(two)
    assert said[0] == "ckpt_002: 1 task to do, 1 done" and len(results) == 2


def test_a_group_has_a_score_of_its_own(own: Path, tasks: Path) -> None:
    """Catches a mean that does not weigh tasks by their items, and one written at each start."""
    wanted, _ = select_tasks("questions,fixed", None, [tasks])
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    asked = request(own, tasks, "questions,fixed", "2")
    found, groups = evaluation.load_tasks(wanted, None, [])
    group = Group("both", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
    for one in found:
        group.add(one.task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_tasks", lambda *_: (found, {**groups, "both": group}))
        results, _ = done(asked)
        files = sorted((own / "evaluation").rglob("*.json*"))
        before = [(one.stat().st_mtime_ns, one.stat().st_ino, one.read_bytes()) for one in files]
        assert len(files) == 6 and done(asked) == (results, [])
        # Nothing that is done is touched, the group's score neither.
        after = [(one.stat().st_mtime_ns, one.stat().st_ino, one.read_bytes()) for one in files]
        assert after == before
    scores = {one.task: one.scores["acc"] for one in results}
    assert scores["both"] == pytest.approx((scores["questions"] + scores["fixed"]) / 2)
    written = read_result(own / "evaluation" / "both" / "ckpt_002.json")
    assert written.members == ("questions", "fixed") and written.errors["acc"] > 0
    hashes = {one.task: one.items_sha256 for one in results if not one.members}
    assert written.settings == {MEMBERS: hashes} and len(set(hashes.values())) == 2


def test_a_damaged_checkpoint_is_refused(run: Path, tasks: Path, tmp_path: Path) -> None:
    """Catches scores of weights that are not those saved."""
    copy = tmp_path / "damaged"
    shutil.copytree(run / "checkpoints" / "ckpt_002", copy / "checkpoints" / "ckpt_002")
    for file in (copy / "checkpoints" / "ckpt_002" / "model").iterdir():
        content = bytearray(file.read_bytes())
        content[-3] ^= 16
        file.write_bytes(content)
    wanted, _ = select_tasks("texts", None, [tasks])
    paths = chosen(copy, "all")
    tokenizer = run.parents[1] / "data" / "tokenizer.model"
    with pytest.raises(CheckpointError, match="ckpt_002"):
        evaluate_run(Request(copy, paths, wanted, tokenizer=tokenizer), ALONE, lambda _: None)
    assert read_results(copy) == []


def test_data_that_are_not_here(own: Path, tasks: Path, tmp_path: Path) -> None:
    """Catches a traceback of the network, and a task that is left out silently."""
    (tmp_path / "away.yaml").write_text((tasks / "texts.yaml").read_text())
    with pytest.raises(DataError, match=r"its data file .*texts\.jsonl is not there"):
        done(request(own, tmp_path, "away"))
