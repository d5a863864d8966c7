"""Mirrors of a real run that is stopped and resumed: W&B's files and TensorBoard's, read back.

The values are compared with `metrics.jsonl` and `held_out.jsonl`, which the run writes by itself.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import sync_wandb

from k2train.config.load import Config
from k2train.evaluation.results import TaskResult, write_result
from k2train.record import mirror
from k2train.record.energy import Site
from k2train.record.held_out import HeldOutRecord
from k2train.record.metrics import checked_records, read_metrics
from k2train.record.tensorboard import FOLDER, TOKENS
from k2train.train.mirrors import flops_of_rank, lines_of, trained_until, wandb_run
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import config_tree, make_corpus, trainer_job
from tests.support.wandb_file import history_row, wandb_records

WANDB = {
    "mode": "offline",
    "entity": "team",
    "group": "stages",
    "tags": ["a", "b"],
    "notes": "a note",
}


@pytest.fixture(autouse=True)
def _own_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B names its service in the environment, where programs of later tests would find it."""
    monkeypatch.setenv("WANDB_SERVICE", "")
    monkeypatch.delenv("WANDB_SERVICE")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pool: GlooPool) -> Path:
    """A run that stopped after step 7 and went on to the end, step 10."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    base = tmp_path_factory.mktemp("mirrors")
    make_corpus(base / "data", 2)
    tree = config_tree(
        base / "data" / "manifest.json",
        base / "runs",
        "mirrored",
        wandb=WANDB,
        tracking={"tensorboard": True},
        energy={"device_watts": 20.0, "pue": 1.5},
        data__held_out_rows=3,
    )
    first = {**tree, "run": {**tree["run"], "stop_after_steps": 7}}
    assert pool.run(1, trainer_job, first) == [75]
    assert pool.run(1, trainer_job, tree) == [0]
    return base / "runs" / "mirrored"


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(point.step, point.value) for point in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def _texts(folder: Path) -> dict[str, list[str]]:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {
        tag: [t.tensor_proto.string_val[0].decode() for t in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
    }


def _same_curves(live: Path, rebuilt: Path) -> None:
    """The same points; the clock of the mirror is not that of the ledger to the bit."""
    shown, again = _scalars(live), _scalars(rebuilt)
    assert shown.keys() == again.keys()
    for tag, points in shown.items():
        if tag.startswith("time/"):
            assert [step for step, _ in points] == [step for step, _ in again[tag]], tag
        else:
            assert points == again[tag], tag
    assert [step for step, _ in shown["time/effective_percent"]] == [0, 5, 7, 7, 10, 10]
    assert all(0 <= value <= 100 for _, value in again["time/effective_percent"])


def _scores(run: Path) -> list[HeldOutRecord]:
    records = checked_records(run / "held_out.jsonl", HeldOutRecord)
    return [record for _, record in records if isinstance(record, HeldOutRecord)]


def _check_tensorboard(folder: Path, run: Path) -> None:
    rows = read_metrics(run / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, 11))
    shown, over_tokens = _scalars(folder), _scalars(folder / TOKENS)
    losses = [(row.step, pytest.approx(row.loss)) for row in rows]
    assert shown["loss/train"] == losses
    assert over_tokens["loss_over_tokens/train"] == [
        (row.consumed_tokens, pytest.approx(row.loss)) for row in rows
    ]
    scores = [(score.step, pytest.approx(score.loss)) for score in _scores(run)]
    assert shown["loss/held_out"] == scores and [step for step, _ in scores] == [0, 5, 10]
    assert len(shown["held_out_by_subset/noise"]) == 3


def test_tensorboard_shows_what_the_run_recorded(run: Path) -> None:
    """Catches a step that is lost or doubled by a restart, and a curve over another axis."""
    _check_tensorboard(run / FOLDER, run)


def test_wandb_has_one_run_with_what_was_recorded(run: Path) -> None:
    """Catches a second run for a second start, rows that W&B drops, and a config without facts."""
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    kept: list[dict[str, Any]] = []
    configs: list[dict[str, str]] = []
    for file in files:
        records = wandb_records(file)
        kept += [row for row in map(history_row, records) if "attempt" in row]
        told = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        assert (told.entity, told.run_group, list(told.tags), told.notes) == (
            "team",
            "stages",
            ["a", "b"],
            "a note",
        )
        updates = [r.config.update for r in records if r.WhichOneof("record_type") == "config"]
        configs.append({item.key: item.value_json for update in updates for item in update})

    rows = read_metrics(run / "metrics.jsonl")
    trained = [row for row in kept if "loss/train" in row]
    assert [(row["step"], row["attempt"]) for row in trained] == [
        (row.step, row.attempt) for row in rows
    ]
    assert [row["loss/train"] for row in trained] == [row.loss for row in rows]
    hours = [sum(row.seconds for row in rows[:count]) / 3600 for count in range(1, 11)]
    assert [row["hours"] for row in trained] == pytest.approx(hours)
    # 20 W at a PUE of 1.5, also behind a restart.
    assert [row["energy/kwh"] for row in trained] == pytest.approx([0.03 * h for h in hours])
    shares = [row for row in kept if "time/effective_percent" in row]
    assert [row["step"] for row in shares] == [0, 5, 7, 7, 10, 10]
    for row in shares:
        lost = row["time/hours"] - row["time/lost_hours"]
        assert 100 * lost / row["time/hours"] == pytest.approx(row["time/effective_percent"])
    assert [row["loss/held_out"] for row in kept if "loss/held_out" in row] == [
        score.loss for score in _scores(run)
    ]
    # W&B drops a row whose number is not above the last.
    numbers = [row["_step"] for row in kept]
    assert numbers == sorted(set(numbers))
    for config in configs:
        assert '"parameters":' in config["facts"] and '"data_parallel":1' in config["facts"]


def test_the_record_alone_gives_the_same_curves(run: Path, tmp_path: Path) -> None:
    """Catches a rebuilt mirror that differs from the one written while the run trained."""
    assert sync_wandb.main([str(run), "--tensorboard", str(tmp_path / "curves")]) == 0
    _check_tensorboard(tmp_path / "curves", run)
    _same_curves(run / FOLDER, tmp_path / "curves")
    # Facts of both starts and the alert of the end: what a new folder would lack.
    texts = _texts(tmp_path / "curves")
    assert len(texts["run/facts"]) == 2 and "world_size: 1" in texts["run/facts"][0]
    assert texts["run/alerts"] == ["**run finished** step 10"]
    # A second time it would mix with the first.
    assert sync_wandb.main([str(run), "--tensorboard", str(tmp_path / "curves")]) == 2


def test_a_record_longer_than_the_queue_is_rebuilt(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rebuilt mirror that gives up because it is slower than the reading of the record,
    and one that is never given up by a reader that waits for it.
    """
    monkeypatch.setattr(mirror, "MAX_QUEUED", 1)
    assert sync_wandb.main([str(run), "--tensorboard", str(tmp_path / "curves")]) == 0
    _same_curves(run / FOLDER, tmp_path / "curves")
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert sync_wandb.main([str(run), "--tensorboard", str(place)]) in (1, 2)


def test_wandb_is_rebuilt_under_another_id(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync_wandb.main([str(run), "--id", "again"]) == 0
    assert "10 steps, 3 held-out scores: written to " in capsys.readouterr().out
    (file,) = run.glob("wandb/offline-run-*/run-again.wandb")
    records = wandb_records(file)
    rows = [row for row in map(history_row, records) if "loss/train" in row]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert not [r for r in records if r.WhichOneof("record_type") == "alert"]
    file.unlink()


def test_scores_on_tasks_are_in_both_mirrors(run: Path, tmp_path: Path) -> None:
    """Catches a score at the last step instead of its checkpoint's, and one of an undone step."""
    facts: dict[str, Any] = {
        "format": 1,
        "task": "sums",
        "version": "1",
        "style": "default",
        "manifest_sha256": "a",
        "harness": "h",
        "items": 0,
        "items_sha256": "b",
    }
    for step, acc in ((5, 0.25), (10, 0.5), (15, 0.75)):
        own = {"checkpoint": f"ckpt_{step:03d}", "step": step, "scores": {"acc": acc}}
        write_result(run, TaskResult.parse({**facts, **own}), [])
    try:
        assert sync_wandb.main([str(run), "--tensorboard", str(tmp_path / "curves")]) == 0
        assert _scalars(tmp_path / "curves")["evaluation/sums/acc"] == [(5, 0.25), (10, 0.5)]
        assert sync_wandb.main([str(run), "--id", "scored"]) == 0
        (file,) = run.glob("wandb/offline-run-*/run-scored.wandb")
        rows = [
            row for row in map(history_row, wandb_records(file)) if "evaluation/sums/acc" in row
        ]
        assert [(row["step"], row["evaluation/sums/acc"]) for row in rows] == [(5, 0.25), (10, 0.5)]
        file.unlink()
    finally:
        shutil.rmtree(run / "evaluation")


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sync_wandb.main([str(tmp_path)]) == 2
    assert "no config.yaml there; give the directory of a run" in capsys.readouterr().err


def test_a_failure_is_one_line_that_says_what_to_do(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches the words of a run that goes on in a tool that has none, and a traceback."""
    monkeypatch.setattr("wandb.login", lambda **asked: False)
    assert sync_wandb.main([str(run), "--mode", "online"]) == 1
    assert capsys.readouterr().err == (
        "W&B was not written: it has no credentials (run `wandb login` once, or set "
        "wandb.mode=offline); the record of the run is as it was; without --mode online a folder "
        "for `wandb sync` is made\n"
    )
    for name in ("config.yaml", "ledger.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert sync_wandb.main([str(tmp_path)]) == 2
    assert "no step is on record, so nothing to write" in capsys.readouterr().err


def test_what_earlier_starts_trained(run: Path, tmp_path: Path) -> None:
    """Catches an axis of hours that begins anew, and one that counts a step twice."""
    rows = read_metrics(run / "metrics.jsonl")
    seconds = sum(row.seconds for row in rows[:4])
    assert trained_until(run / "metrics.jsonl", 4, Site(20.0), 3) == (
        rows[3].consumed_tokens,
        pytest.approx(seconds),
        pytest.approx(60 * seconds),
    )
    assert trained_until(tmp_path / "none.jsonl", 4) == (0, 0.0, 0.0)
    (tmp_path / "damaged.jsonl").write_text("{\n{\n", encoding="utf-8")
    assert trained_until(tmp_path / "damaged.jsonl", 4) == (0, 0.0, 0.0)
    assert lines_of(run / "metrics.jsonl") == 10 + 3 and lines_of(tmp_path / "none.jsonl") == 0


def test_the_work_of_a_rank_is_its_share(run: Path) -> None:
    """The usual estimate, 6 FLOPs a parameter of the matrices and token, is a lower bound."""
    tree = config_tree(run / "m.json", run, "r")
    config = Config.model_validate(tree)
    whole = flops_of_rank(config, 1)
    matrices = 4 * (4 * 32 * 32 + 3 * 32 * 48) + 251 * 32
    assert 6 * matrices < whole < 12 * matrices
    assert flops_of_rank(config, 2) == pytest.approx(whole / 2)
    assert wandb_run(config, "id", 7).for_init() == {
        "mode": "disabled",
        "project": "k2train",
        "name": "r",
        "id": "id",
        "config": config.model_dump(mode="json"),
    }
