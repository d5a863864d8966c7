"""Held-out scores of whole runs against Hugging Face on the same rows, on any batch and layout."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from k2train.api import open_run
from k2train.checkpoint.load import load_states
from k2train.checkpoint.manifest import read_manifest
from k2train.checkpoint.run_facts import HeldOutFacts
from k2train.config.load import Config, load_config, to_yaml
from k2train.data.held_out import HeldOutSet
from k2train.data.manifest import Manifest
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.errors import ConfigError, DataError, UnavailableError
from k2train.files import sha256_file
from k2train.launch.environment import Launch
from k2train.record.events import CheckpointSaved, of_kind
from k2train.record.held_out import HeldOutRecord
from k2train.record.ledger import read_ledger
from k2train.record.metrics import checked_records
from k2train.record.score_files import evaluated_sets
from k2train.train.held_out_sets import held_out_texts_note
from k2train.train.preflight import prepare_start
from k2train.train.trainer import Trainer
from tests.model.test_hugging_face import hugging_face
from tests.support.data_folder import add_chunk, finish, rewrite
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import (
    GLOBAL,
    SEQUENCE,
    VOCAB,
    config_tree,
    make_corpus,
    train,
    trainer_job,
    write_yaml,
)
from tests.support.tiny_model import assemble, engine_of, grid_of, local_gradients, shapes_of

ROWS = 31
"""Held-out rows: a prime, which no batch or grid divides."""
KINDS = ["code" if row % 3 else "web" for row in range(ROWS)]


def pieces_of(subsets: list[str]) -> dict[str, Any]:
    """Provenance of rows of one piece each."""
    rows = len(subsets)
    return {
        "row": list(range(rows)),
        "start": [0] * rows,
        "length": [SEQUENCE] * rows,
        "subset": subsets,
        "source": ["a"] * rows,
        "fim": ["none"] * rows,
        "document": [str(row) for row in range(rows)],
        "offset": [0] * rows,
        "repeat": [0] * rows,
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`: training chunks and ROWS held-out rows of two subsets. `other`: chunks alone."""
    folder = tmp_path_factory.mktemp("held_out")
    make_corpus(folder / "data", 1, held_out=False)
    rng = np.random.default_rng(5)
    subsets = {kind: KINDS.count(kind) * SEQUENCE for kind in ("code", "web")}
    ids = rng.integers(0, VOCAB, (ROWS, SEQUENCE))
    held_out = add_chunk(folder / "data", "held_out", ids, VOCAB, subsets, pieces=pieces_of(KINDS))
    rewrite(folder / "data", held_out=held_out)
    (folder / "other").mkdir()
    chunks = [
        add_chunk(folder / "other", f"chunk_{i:03d}", rng.integers(0, VOCAB, (n, SEQUENCE)), VOCAB)
        for i, n in enumerate((5, 8))
    ]
    finish(folder / "other", chunks, SEQUENCE, VOCAB)
    return folder


def tree(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    changes = {"lr": {"kind": "constant", "peak": 1e-2}, **changes}
    return config_tree(base / "data" / "manifest.json", base / "runs", name, **changes)


def weights_job(launch: Launch, config: Config, path: str) -> Any:
    grid = grid_of(launch, config)
    engine = engine_of(config, grid, fill=False)
    load_states(
        Path(path), engine.gradients.shard_layout, engine.optimizer.flat_shards, grid, engine.dtype
    )
    return local_gradients(engine, engine.optimizer.master)


def row_losses(pool: GlooPool, settings: dict[str, Any], path: Path, ids: Any) -> list[float]:
    """Mean loss of each row by Hugging Face's model and torch's cross entropy in fp64."""
    one = Config.model_validate({**settings, "parallel": {}})
    weights = assemble(pool.run(1, weights_job, one, str(path)), shapes_of(one))
    model = hugging_face(one, weights).double()
    tokens = torch.from_numpy(np.asarray(ids).astype(np.int64))
    with torch.no_grad():
        logits = model(tokens).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.mean(dim=1).tolist()


def scores_of(base: Path, name: str, checkpoint: str = "ckpt_001") -> tuple[HeldOutFacts, ...]:
    return read_manifest(base / "runs" / name / "checkpoints" / checkpoint).held_out or ()


def events_of(run: Path) -> list[CheckpointSaved]:
    return of_kind(read_ledger(run / "ledger.jsonl"), CheckpointSaved)


def ids_of(base: Path, file: str) -> Any:
    return np.load(base / f"{file}.npy")


def test_a_score_is_hugging_faces_on_the_same_rows(base: Path, pool: GlooPool) -> None:
    """Catches a loss divided by all positions, by rows, or by batches; rows that are left out;
    padding that counts; subsets that are mixed up; and a set of which a part alone is scored.
    """
    settings = tree(base, "one", data__held_out_sets={"other": str(base / "other")})
    assert pool.run(1, trainer_job, settings) == [0]
    path = base / "runs" / "one" / "checkpoints" / "ckpt_001"
    expected = row_losses(pool, settings, path, ids_of(base, "data/held_out"))
    own, other = scores_of(base, "one")
    assert (own.name, own.rows, own.rows_left_out) == ("held_out", ROWS, 0)
    assert own.targets == ROWS * (SEQUENCE - 1)
    assert own.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert read_manifest(path).held_out_loss == own.loss
    assert [(part.name, part.rows) for part in own.subsets] == [
        (kind, KINDS.count(kind)) for kind in ("code", "web")
    ]
    for part in own.subsets:
        mine = [loss for loss, kind in zip(expected, KINDS, strict=True) if kind == part.name]
        assert part.loss == pytest.approx(np.mean(mine), rel=1e-5)
    ids = np.concatenate([ids_of(base, f"other/chunk_00{i}") for i in range(2)])
    expected = row_losses(pool, settings, path, ids)
    assert (other.name, other.rows, other.rows_left_out) == ("other", 13, 0)
    assert other.loss == pytest.approx(np.mean(expected), rel=1e-5)


ONE_STEP = 60
"""A batch larger than the held-out rows; the chunk has one of them."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "batch-4": (1, {"batch__global_sequences": 4, "batch__micro_sequences": 1}),
    "batch-60": (1, {"batch__global_sequences": ONE_STEP, "batch__micro_sequences": 4}),
    "data-2": (2, {"batch__micro_sequences": 3}),
    "pipeline-2": (2, {"parallel__pipeline": 2, "batch__micro_sequences": 2}),
    "zb-v": (
        2,
        {
            "parallel__pipeline": 2,
            "parallel__schedule": "zb-v",
            "batch__global_sequences": ONE_STEP,
        },
    ),
    "tensor-2-data-2": (4, {"parallel__tensor": 2, "batch__micro_sequences": 2}),
    "reference-loss": (1, {"kernels__loss": "reference", "batch__micro_sequences": 6}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_number_for_one_checkpoint(base: Path, pool: GlooPool, name: str) -> None:
    """The initial weights, which depend on the seed alone: catches a number that depends on batch,
    micro-batch or layout, and ranks that wait for each other where rows run out.
    """
    if not (base / "runs" / "start").exists():
        assert pool.run(1, trainer_job, tree(base, "start", run__stop_after_steps=1)) == [75]
    world, changes = LAYOUTS[name]
    settings = tree(base, name, run__stop_after_steps=1, **changes)
    code = 0 if settings["batch"]["global_sequences"] == ONE_STEP else 75
    assert pool.run(world, trainer_job, settings) == [code] * world
    (one,), (mine,) = scores_of(base, "start", "ckpt_000"), scores_of(base, name, "ckpt_000")
    assert (mine.rows, mine.rows_left_out) == (ROWS, 0)
    assert mine.loss == pytest.approx(one.loss, rel=1e-6)
    for part, same in zip(mine.subsets, one.subsets, strict=True):
        assert (part.name, part.rows) == (same.name, same.rows)
        assert part.loss == pytest.approx(same.loss, rel=1e-6)


@pytest.fixture(scope="module")
def losses(base: Path, pool: GlooPool) -> list[float]:
    """Loss of each held-out row with the initial weights, by Hugging Face."""
    settings = tree(base, "initial", run__stop_after_steps=1)
    assert pool.run(1, trainer_job, settings) == [75]
    path = base / "runs" / "initial" / "checkpoints" / "ckpt_000"
    return row_losses(pool, settings, path, ids_of(base, "data/held_out"))


@pytest.mark.parametrize(
    ("changes", "rows"),
    (
        ({"data__held_out_rows": 1}, 1),
        ({"data__held_out_rows": 17}, 17),
        ({"data__held_out_rows": 1000}, ROWS),
        ({"data__held_out_batches": 2}, 2 * GLOBAL),
        ({"data__held_out_batches": 3}, ROWS),
        ({"data__held_out_rows": 0}, 0),
    ),
)
def test_the_first_rows_that_were_asked_for(
    base: Path, pool: GlooPool, losses: list[float], changes: dict[str, int], rows: int
) -> None:
    """Catches a key that has no effect, one that counts something else, and rows of another place.
    With 0 the held-out chunk is not even opened.
    """
    name = "-".join(map(str, changes.values())) + next(iter(changes))
    settings = tree(base, name, run__stop_after_steps=1, **changes)
    assert pool.run(2, trainer_job, settings) == [75, 75]
    scores = scores_of(base, name, "ckpt_000")
    if not rows:
        assert scores == ()
        return
    assert [(part.rows, part.rows_left_out) for part in scores] == [(rows, ROWS - rows)]
    assert scores[0].loss == pytest.approx(np.mean(losses[:rows]), rel=1e-5)


def test_without_scoring_no_held_out_file_is_read(base: Path, tmp_path: Path) -> None:
    """Catches a start that needs a chunk of which it scores nothing."""
    manifest = make_corpus(tmp_path / "data", 1)
    (tmp_path / "data" / "held_out.npy").unlink()

    def config(**changes: Any) -> Config:
        return Config.model_validate(config_tree(manifest.path, tmp_path, "run", **changes))

    prepare_start(config(data__held_out_rows=0), 1, verify=True)
    with pytest.raises(DataError, match="held_out"):
        prepare_start(config(), 1, verify=True)


def test_without_a_set_no_record_has_a_score(pool: GlooPool, tmp_path: Path) -> None:
    """Catches an empty list of scores, where older ledgers have no key."""
    manifest = make_corpus(tmp_path / "data", 1, held_out=False)
    settings = config_tree(manifest.path, tmp_path / "runs", "run")
    assert pool.run(1, trainer_job, settings) == [0]
    run = tmp_path / "runs" / "run"
    assert [event.held_out for event in events_of(run)] == [None, None]
    assert '"held_out":' not in (run / "ledger.jsonl").read_text()
    assert read_manifest(run / "checkpoints" / "ckpt_001").held_out is None


def test_every_record_says_what_was_scored(base: Path) -> None:
    """Catches a record without the rows, the subsets or the sets, and another number on the
    console.
    """
    sets = {"other": str(base / "other" / "manifest.json")}
    settings = tree(base, "told", data__held_out_rows=30, data__held_out_sets=sets)
    done = train(write_yaml(base / "told.yaml", settings))
    assert done.returncode == 0, done.stderr
    run = base / "runs" / "told"
    own, other = scores_of(base, "told")
    saved = events_of(run)[-1]
    assert saved.held_out is not None and saved.held_out_loss == own.loss
    for score, facts in zip(saved.held_out, (own, other), strict=True):
        same = ("name", "loss", "rows", "rows_left_out", "targets")
        assert [getattr(score, key) for key in same] == [getattr(facts, key) for key in same]
    lines = [record for _, record in checked_records(run / "held_out.jsonl", HeldOutRecord)]
    assert [(line.step, line.set, line.rows) for line in lines] == [
        (step, name, rows) for step in (0, 5) for name, rows in (("held_out", 30), ("other", 13))
    ]
    # Each evaluation is one line of the metrics, behind that of its step.
    text = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in text] == [0, 1, 2, 3, 4, 5, 5]
    in_metrics = json.loads(text[-1])["held_out"]
    code, web = own.subsets
    assert [*in_metrics] == ["held_out", "other"]
    assert in_metrics["held_out"]["subsets"] == {"code": code.loss, "web": web.loss}
    assert in_metrics["other"]["loss"] == other.loss and in_metrics["other"]["rows"] == 13
    assert [one for _, one in evaluated_sets(run / "metrics.jsonl")] == lines
    columns = open_run(run).metrics()
    assert columns[-1]["held_out.held_out.subsets.web"] == web.loss
    assert columns.column("held_out.other.loss")[-1] == other.loss
    assert (lines[2].loss, lines[2].rows_left_out) == (own.loss, 1)
    assert lines[2].subsets == {"code": code.loss, "web": web.loss}
    assert (
        f"saved ckpt_001 at step 5, held-out loss {own.loss:.4f} over 30 of 31 rows ("
        in done.stderr
    )
    assert f"held-out loss by subset: code {code.loss:.4f}, web {web.loss:.4f}" in done.stderr
    assert f"held-out set other: loss {other.loss:.4f} over 13 rows" in done.stderr
    assert done.stderr.count("held-out set other: no loss by subset: ") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    (
        (lambda data: (data.folder / "held_out.parquet").unlink(), "is missing"),
        (lambda data: (data.folder / "held_out.parquet").write_bytes(b"x"), "is not the file"),
    ),
)
def test_without_provenance_the_total_is_known(
    base: Path, tmp_path: Path, change: Any, words: str
) -> None:
    """Catches a run that ends, or keeps quiet, because it cannot tell the subsets apart."""
    manifest = make_corpus(tmp_path / "data", 1)
    assert manifest.held_out is not None
    kinds = ["a", "b"] * GLOBAL
    ids = np.load(tmp_path / "data" / "held_out.npy")
    half = {kind: GLOBAL * SEQUENCE for kind in "ab"}
    held_out = add_chunk(manifest.folder, "held_out", ids, VOCAB, half, pieces=pieces_of(kinds))
    change(rewrite(manifest.folder, held_out=held_out))
    settings = config_tree(manifest.path, tmp_path / "runs", "run", run__stop_after_steps=1)
    done = train(write_yaml(tmp_path / "run.yaml", settings))
    assert done.returncode == 75
    (line,) = [line for line in done.stderr.splitlines() if "no loss by subset" in line]
    assert "held_out.parquet" in line and words in line
    (score,) = scores_of(tmp_path, "run", "ckpt_000")
    assert score.subsets == () and score.rows == 2 * GLOBAL


def two_subsets(folder: Path) -> Manifest:
    """A data folder whose held-out rows are by turns of subset a and b."""
    manifest = make_corpus(folder, 1)
    ids = np.load(folder / "held_out.npy")
    half = {kind: GLOBAL * SEQUENCE for kind in "ab"}
    held_out = add_chunk(
        folder, "held_out", ids, VOCAB, half, pieces=pieces_of(["a", "b"] * GLOBAL)
    )
    return rewrite(manifest.folder, held_out=held_out)


def without_provenance(trainer: Trainer) -> None:
    """Take the provenance away once the start is over."""
    for part in trainer.start.held_out:
        (part.manifest.folder / "held_out.parquet").unlink(missing_ok=True)


def away(launch: Launch, tree: dict[str, Any]) -> int | str:
    """A run whose file server does not answer for the provenance."""
    gone = UnavailableError("held_out.parquet: did not answer for 120 s")
    with mock.patch("k2train.data.inspect.provenance.sha256_file", side_effect=gone):
        return trainer_job(launch, tree)


def test_subsets_are_read_at_the_start(pool: GlooPool, tmp_path: Path) -> None:
    """Catches a hash of gigabytes at a chunk's end, on one rank while the others wait."""
    manifest = two_subsets(tmp_path / "data")
    settings = config_tree(manifest.path, tmp_path / "runs", "run", run__stop_after_steps=1)
    assert pool.run(1, trainer_job, settings) == [75]
    del settings["run"]["stop_after_steps"]
    assert pool.run(1, trainer_job, settings, without_provenance) == [0]
    (score,) = scores_of(tmp_path, "run", "ckpt_001")
    assert [(part.name, part.rows) for part in score.subsets] == [("a", GLOBAL), ("b", GLOBAL)]


def test_a_provenance_that_does_not_answer_ends_no_run(pool: GlooPool, tmp_path: Path) -> None:
    """Catches rank 0 leaving for an optional file, before the save, while the others go on."""
    settings = config_tree(two_subsets(tmp_path / "data").path, tmp_path / "runs", "run")
    settings["batch"]["micro_sequences"] = 3
    assert pool.run(2, away, settings) == [0, 0]
    (score,) = scores_of(tmp_path, "run", "ckpt_001")
    assert score.subsets == () and score.rows == 2 * GLOBAL


def test_a_set_that_is_trained_on_is_told(base: Path) -> None:
    """Catches a low loss of rows that the run learns by heart."""
    sets = {"mine": str(base / "same"), "other": str(base / "other")}
    make_corpus(base / "same", 1, held_out=False)
    settings = tree(base, "leak", data__held_out_sets=sets, run__stop_after_steps=1)
    done = train(write_yaml(base / "leak.yaml", settings))
    assert done.returncode == 75
    (line,) = [line for line in done.stderr.splitlines() if "flatter" in line]
    assert "held-out set mine is trained on" in line and "chunk_000 is chunk_000" in line


def test_a_set_with_texts_of_the_training_data_is_told(base: Path, tmp_path: Path) -> None:
    """Catches rows from a file that is trained on, cut anew: no chunk is the same."""
    for name, seed in (("data", 1), ("cut", 9)):
        make_corpus(tmp_path / name, 1, seed=seed, held_out=False)
        sources = tmp_path / name / "sources.json"
        sources.write_text('{"training": ["a.txt"], "held_out": []}')
        rewrite(tmp_path / name, facts={"sources_sha256": sha256_file(sources)})
    sets = {"cut": str(tmp_path / "cut"), "other": str(base / "other")}
    settings = config_tree(
        tmp_path / "data" / "manifest.json",
        tmp_path / "runs",
        "run",
        data__held_out_sets=sets,
        run__stop_after_steps=1,
    )
    done = train(write_yaml(tmp_path / "run.yaml", settings))
    assert done.returncode == 75, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "flatters" in line]
    assert "held-out set cut: its data folder and the training data have in common: source" in line
    assert "a.txt" in line

    # The set of the training's own folder is held out by its preparation.
    own = read_data_manifest(base / "other")
    assert held_out_texts_note(HeldOutSet.of("own", own, None), own) == ""
    sources.write_text("[]")
    damaged = HeldOutSet.of("cut", read_data_manifest(tmp_path / "cut"), None)
    note = held_out_texts_note(damaged, read_data_manifest(tmp_path / "data"))
    assert note.startswith("held-out set cut was not compared with the training data: ")


def other_tokenizer(folder: Path) -> None:
    rewrite(folder, tokenizer_sha256="u" * 64)


def no_chunk(folder: Path) -> None:
    (folder / "chunk_001.npy").unlink()


@pytest.mark.parametrize(
    ("make", "words"),
    (
        (other_tokenizer, "was made with tokenizer uuuuuuuuuuuu, the training data with tttttttt"),
        (no_chunk, "chunk_001"),
        (lambda folder: (folder / "manifest.json").unlink(), "cannot be read"),
    ),
)
def test_a_set_that_does_not_fit_is_refused(
    base: Path, tmp_path: Path, make: Any, words: str
) -> None:
    """Catches a set of other tokens, and one that is found missing at the first checkpoint."""
    make_corpus(tmp_path / "other", 2, held_out=False)
    make(tmp_path / "other")
    sets = {"mine": str(tmp_path / "other" / "manifest.json")}
    config = Config.model_validate(tree(base, "unfit", data__held_out_sets=sets))
    with pytest.raises(DataError, match=words):
        prepare_start(config, 1, verify=True)


def test_rows_of_another_length_are_refused(base: Path, tmp_path: Path) -> None:
    """Catches a set whose rows the model would read as something else."""
    chunk = add_chunk(tmp_path, "chunk_000", np.zeros((4, SEQUENCE + 1), dtype=int), VOCAB)
    finish(tmp_path, [chunk], SEQUENCE + 1, VOCAB)
    config = Config.model_validate(tree(base, "long", data__held_out_sets={"x": str(tmp_path)}))
    with pytest.raises(DataError, match=r"data.held_out_sets.x: the rows of .* have 17 tokens"):
        prepare_start(config, 1, verify=True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    (
        (
            ("data.held_out_batches=2", "data.held_out_rows=5"),
            "leave one out (2 batches are data.held_out_rows: 24)",
        ),
        (("data.held_out_sets.held_out=x",), "held_out is no name for a set"),
        (("data.held_out_sets.a=3",), "data.held_out_sets.a: must be text"),
        (("data.held_out_sets=x",), "must be a section of names"),
        (("data.held_out_rows=-1",), "data.held_out_rows: must be at least 0"),
    ),
)
def test_what_contradicts_itself_is_refused(
    base: Path, overrides: tuple[str, ...], words: str
) -> None:
    """Catches two keys that both decide, and names that cannot be told apart."""
    path = write_yaml(base / "wrong.yaml", tree(base, "wrong"))
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), overrides)
    assert words in str(caught.value)


def test_sets_are_written_and_read_back(base: Path) -> None:
    """Catches a `config.yaml` of a run that its next reader does not understand."""
    path = write_yaml(base / "sets.yaml", tree(base, "sets"))
    config = load_config(str(path), ["data.held_out_sets.a=data/a b.json", "data.held_out_rows=3"])
    assert config.data.held_out_sets == {"a": "data/a b.json"}
    (base / "again.yaml").write_text(to_yaml(config))
    assert load_config(str(base / "again.yaml")) == config
