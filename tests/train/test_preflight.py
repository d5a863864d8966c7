"""Preflight checks: data, checkpoint to resume from, identity of the run, stage transition."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import k2train.train.checkpoints_ahead as checkpoints_ahead
import k2train.train.preflight as preflight
from k2train.checkpoint import disk_space
from k2train.checkpoint.disk_space import CheckpointBytes
from k2train.checkpoint.manifest import MANIFEST, THINNED, checkpoint_name, seal
from k2train.checkpoint.retention import KEEP
from k2train.config.load import Config
from k2train.data.prepare.write.text_files import write_texts
from k2train.errors import CheckpointError, ConfigError, DataError, RunError
from k2train.files import sha256_file, write_synced
from k2train.plan.cost import parameters, tensor_count
from k2train.train.held_out_sets import held_out_sets
from k2train.train.preflight import (
    check_data,
    prepare_start,
    verify_data,
)
from k2train.train.resume_check import identity_differences, identity_of
from k2train.train.setup import Setup
from k2train.train.state import TrainState
from tests.support.data_folder import flip, rewrite
from tests.support.tiny_corpus import GLOBAL, SEQUENCE, STEPS_PER_CHUNK, config_tree, make_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight") / "data"
    make_corpus(folder, 3)
    return folder


class Run:
    """A config and, where asked, checkpoints that are nothing but their manifests."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data = folder, data
        self.directory = folder / "runs" / "r"

    def config(self, **changes: Any) -> Config:
        return Config.model_validate(
            config_tree(self.data / "manifest.json", self.folder / "runs", "r", **changes)
        )

    def start(self, world: int = 1, **changes: Any) -> preflight.Start:
        return prepare_start(self.config(**changes), world, verify=True)

    def checkpoint(self, chunks: int, step: int, numbered: bool = True, **facts: Any) -> Path:
        config = self.config()
        manifest, order = check_data(config)
        name = checkpoint_name(chunks, None if numbered else step)
        path = self.directory / "checkpoints" / name
        path.mkdir(parents=True)
        (path / "model").mkdir()
        identity = identity_of(config, manifest, order)
        content = {
            "format": 1,
            "name": name,
            "step": step,
            "adam_steps": step,
            "consumed_tokens": step * GLOBAL * SEQUENCE,
            "chunks": {
                "consumed": chunks,
                "step_in_chunk": step - STEPS_PER_CHUNK * chunks,
                "order": identity["data"]["order"],
            },
            "config": config.model_dump(mode="json"),
            "identity": identity,
            "data": {
                "tokenizer_sha256": manifest.tokenizer_sha256,
                "manifest_sha256": manifest.sha256,
            },
            "guard": TrainState().to_json()["guard"],
            "lr": 0.25,
            "tensors": {},
            "files": {},
            **facts,
        }
        (path / MANIFEST).write_text(json.dumps(seal(content)))
        return path


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Run:
    return Run(tmp_path, data)


def test_a_fresh_start(run: Run) -> None:
    """Nothing to resume from, nothing written, the layout of the world size."""
    start = run.start(world=6, parallel__tensor=2, batch__micro_sequences=2)
    assert (start.candidates, start.refused, start.parent) == ((), (), None)
    assert (start.layout.tensor, start.layout.data) == (2, 3)
    assert start.order.total_steps == 15
    assert not run.folder.joinpath("runs").exists()


def test_the_newest_is_wanted_first(run: Run) -> None:
    """A save on request lies between its chunk's number and the next.

    Name order alone would do the same by luck only.
    """
    for chunks, step, numbered in ((0, 0, True), (1, 5, True), (1, 7, False), (1, 9, False)):
        run.checkpoint(chunks, step, numbered)
    names = [path.name for path in run.start().candidates]
    assert names == ["ckpt_001_step_000009", "ckpt_001_step_000007", "ckpt_001", "ckpt_000"]
    run.checkpoint(2, 10)
    assert run.start().candidates[0].name == "ckpt_002"
    assert [path.name for path in run.start(run__resume=1).candidates] == ["ckpt_001"]
    assert run.start(run__resume="must").candidates[0].name == "ckpt_002"


def test_the_disk_has_space_for_saves_inside_chunks(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three chunks: four numbered checkpoints, and three at once inside chunks.

    A fixed interval needs them and is refused; `auto` does without them, and says so.
    """
    shape = run.start().setup.architecture
    one = CheckpointBytes(parameters(shape), 4, tensor_count(shape)).whole
    fixed, auto = {"checkpoint__every_seconds": 9.0}, {"checkpoint__every_seconds": "auto"}

    def with_room_for(checkpoints: float) -> None:
        monkeypatch.setattr(disk_space, "free_bytes", lambda path: int(checkpoints * one) + 1)

    with_room_for(7)
    assert run.start(**fixed).room_inside_chunks and run.start(**auto).room_inside_chunks
    with_room_for(6.9)
    with pytest.raises(RunError, match="4 checkpoints of this run and 3 inside chunks: they need "):
        run.start(**fixed)
    with pytest.raises(RunError, match=r"free space, set checkpoint\.every_seconds=0, raise"):
        run.start(**fixed)
    assert not run.start(**auto).room_inside_chunks
    with_room_for(4)
    assert not run.start(**auto).room_inside_chunks
    assert run.start(checkpoint__every_seconds=0).room_inside_chunks
    with_room_for(3.9)
    for every in (auto, {"checkpoint__every_seconds": 0}):
        with pytest.raises(RunError, match="4 checkpoints of this run: they need "):
            run.start(**every)

    # Two of those inside chunks exist; they take no more space, and one is still to come.
    run.checkpoint(0, 0)
    for step in (2, 3):
        run.checkpoint(0, step, numbered=False)
    with_room_for(4)
    assert run.start(**fixed).room_inside_chunks
    with_room_for(3.9)
    with pytest.raises(RunError, match="3 checkpoints of this run and 1 inside chunks"):
        run.start(**fixed)


def test_a_warning_names_the_key_that_helps(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` needs no advice."""
    monkeypatch.setattr(preflight, "check_progress", lambda *_: "interrupted")
    assert run.start(checkpoint__every_seconds="auto").warning == "interrupted"
    for every in (0, 60):
        assert run.start(checkpoint__every_seconds=every).warning == (
            "interrupted; set checkpoint.every_seconds=auto, or lower it"
        )


def test_a_broken_manifest_is_passed_over_and_told(run: Run) -> None:
    """The one before is taken, and the reason is kept for the ledger."""
    run.checkpoint(0, 0)
    (run.checkpoint(1, 5) / MANIFEST).write_text("{")
    start = run.start()
    assert [path.name for path in start.candidates] == ["ckpt_000"]
    assert len(start.refused) == 1 and "ckpt_001" in start.refused[0]


def test_one_without_its_training_state_is_passed_over(run: Run) -> None:
    run.checkpoint(0, 0)
    run.checkpoint(1, 5, guard={"finite": {"total": "none"}})
    start = run.start()
    assert [path.name for path in start.candidates] == ["ckpt_000"]
    assert "ckpt_001/manifest.json: the manifest does not hold the training" in start.refused[0]


def test_a_thinned_one_is_passed_over(run: Run) -> None:
    """Only weights: with a whole one beside it that one is taken, alone it is an error, never a
    fresh start.
    """
    run.checkpoint(0, 0)
    path = run.checkpoint(1, 5)
    (path / THINNED).write_text("{}")
    assert [path.name for path in run.start().candidates] == ["ckpt_000"]
    (run.directory / "checkpoints" / "ckpt_000" / THINNED).write_text("{}")
    with pytest.raises(CheckpointError, match="thinned"):
        run.start()


def test_never_means_never(run: Run) -> None:
    """A directory with a ledger, even without a checkpoint, is an existing run."""
    assert run.start(run__resume="never").candidates == ()
    run.directory.mkdir(parents=True)
    (run.directory / "ledger.jsonl").write_text("")
    with pytest.raises(RunError, match="never"):
        run.start(run__resume="never")


@pytest.mark.parametrize(
    "changes",
    (
        {"batch__micro_sequences": 2},
        {"checkpoint__every_seconds": 5.0},
        {"kernels__attention": "reference"},
        {"run__stop_after_steps": 3},
        {"wandb__mode": "offline"},
        {"parallel__pipeline": 2},
    ),
    ids=str,
)
def test_what_may_change(run: Run, changes: dict[str, Any]) -> None:
    """None of these affects a number of the run, so none may prevent a resume."""
    run.checkpoint(1, 5)
    assert run.start(world=2, **changes).candidates


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"batch__global_sequences": 6}, "batch.global_sequences: 12 -> 6"),
        ({"run__seed": 8}, "run.seed: 7 -> 8"),
        ({"model__init_std": 0.1}, "model.init_std: 0.2 -> 0.1"),
        ({"optimizer__weight_decay": 0.0}, "optimizer.weight_decay: 0.1 -> 0.0"),
        ({"data__order": [0, 2, 1]}, "data.order at position 1: chunk_001"),
        ({"data__order": [0, 1]}, "data.order: 3 chunks -> 2 chunks"),
    ),
    ids=str,
)
def test_what_may_not_change(run: Run, changes: dict[str, Any], words: str) -> None:
    """Each of these would make another run under the same name."""
    run.checkpoint(1, 5)
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        run.start(**changes)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_another_rate_is_no_other_run(run: Run) -> None:
    """Catches a frightening sentence for what the same sentence then allows."""
    run.checkpoint(1, 5)
    with pytest.raises(CheckpointError, match=r"was saved with another schedule .*lr\.peak") as one:
        run.start(lr__peak=0.5)
    assert "belongs to another run" not in str(one.value)
    assert "run.allow=[lr.peak]" in str(one.value)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run.start(lr__peak=0.5, run__seed=8)


def test_differences_of_nothing(run: Run, data: Path) -> None:
    """Equal identities, one of them read back from JSON, do not differ.

    An empty one differs in everything.
    """
    config = run.config()
    identity = identity_of(config, *check_data(config))
    assert identity_differences(json.loads(json.dumps(identity)), identity) == []
    assert len(identity_differences({}, identity)) > 20


def test_a_stop_that_comes_during_a_start_is_no_mistake(run: Run) -> None:
    """Catches exit code 2 on ranks that look after rank 0, whose watch ends the start with 75."""
    run.directory.mkdir(parents=True)
    (run.directory / "STOP").touch()
    assert run.start().candidates == () and (run.directory / "STOP").exists()


def test_large_data_is_not_all_hashed_at_start(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With terabytes of chunks a start must not read them all: the next only.

    And nobody hashes without `verify`.
    """
    seen: list[str] = []
    monkeypatch.setattr(preflight, "verify_chunk", lambda manifest, info: seen.append(info.name))
    prepare_start(run.config(), 1, verify=False)
    assert seen == []
    run.start()
    assert seen == ["chunk_000", "chunk_001", "chunk_002", "held_out"]
    seen.clear()
    monkeypatch.setattr(preflight, "HASH_AT_START_BYTES", 1000)
    manifest, order = check_data(run.config(data__order=[2, 0]))
    for step, names in ((0, ["chunk_002"]), (4, ["chunk_002"]), (5, ["chunk_000"]), (10, [])):
        seen.clear()
        verify_data(manifest, order, step, held_out_sets(run.config(), manifest))
        assert seen == [*names, "held_out"], step


@pytest.mark.parametrize(
    ("hurt", "chunks", "found"),
    (
        ("held_out", 0, True),
        ("held_out", 2, True),
        ("chunk_000", 0, True),
        ("chunk_001", 0, False),
        ("chunk_001", 1, True),
        ("chunk_000", 1, False),
    ),
)
def test_damage_in_what_is_read_next(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, hurt: str, chunks: int, found: bool
) -> None:
    """Large data too: the chunk that the step after the checkpoint opens and the held-out one are
    hashed at the start.
    """
    monkeypatch.setattr(preflight, "HASH_AT_START_BYTES", 0)
    shutil.copytree(data, tmp_path / "data")
    run = Run(tmp_path, tmp_path / "data")
    if chunks:
        run.checkpoint(chunks, 5 * chunks)
    flip(tmp_path / "data" / f"{hurt}.npy")
    if found:
        with pytest.raises(DataError, match=hurt):
            run.start()
    else:
        run.start()


def test_held_out_rows_that_make_no_batch(run: Run) -> None:
    """Catches a large batch that is forbidden because few rows are held out."""
    changes = {"batch__global_sequences": 3 * GLOBAL, "lr__warmup_steps": 0}
    (held_out,) = run.start(**changes).held_out
    assert held_out.rows == held_out.total_rows == 2 * GLOBAL


def test_another_held_out_chunk(run: Run, tmp_path: Path) -> None:
    """Its losses could not be compared with those before: not the same run."""
    run.checkpoint(1, 5)
    other = make_corpus(tmp_path / "other", 1, seed=5).held_out
    shutil.copytree(run.data, tmp_path / "data")
    assert other is not None
    shutil.copy(tmp_path / "other" / other.file, tmp_path / "data" / other.file)
    rewrite(tmp_path / "data", held_out=other)
    with pytest.raises(CheckpointError, match="held_out_sha256") as caught:
        Run(tmp_path, tmp_path / "data").start()
    assert "data.order" not in str(caught.value)


def test_the_rate_is_a_function_of_the_step(run: Run) -> None:
    """Warm-up from the first step, `final` at the last; nothing else goes in."""
    config = run.config(lr={"kind": "linear", "peak": 1.0, "final": 0.25, "warmup_steps": 4})
    rates = [Setup.of(config, 1).learning_rate(step, 10) for step in range(1, 11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[-1] == 0.25
    assert rates[4] == pytest.approx(1 - 0.75 / 6)


def test_a_schedule_that_does_not_fit(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"lr.warmup_steps \(15\)"):
        run.start(lr__warmup_steps=15)


def test_a_batch_no_chunk_holds(run: Run) -> None:
    with pytest.raises(DataError, match="63 rows"):
        run.start(batch__global_sequences=GLOBAL * 6)


def test_a_vocabulary_that_is_too_small(run: Run) -> None:
    """Catches advice that cannot be followed: a later stage keeps the rows of its parent."""
    needed = check_data(run.config())[0].vocab_size
    small = run.config(model__vocab_size=needed - 1)
    with pytest.raises(DataError, match=r"raise it$"):
        check_data(small)

    later = small.model_copy(update={"run": small.run.model_copy(update={"init_from": "runs/a"})})
    with pytest.raises(DataError, match=r"from the first stage on; .* the rows of runs/a$"):
        check_data(later)


def test_the_seam(run: Run, tmp_path: Path) -> None:
    """A run directory means its last checkpoint; the facts name it by
    hash; both rates are there.
    """
    run.checkpoint(0, 0)
    parent = run.checkpoint(3, 15)
    make_corpus(tmp_path / "next", 2, seed=9)
    child = Run(tmp_path / "child", tmp_path / "next")
    start = child.start(
        run__init_from=str(run.directory), lr={"kind": "linear", "peak": 0.5, "warmup_steps": 0}
    )
    assert start.parent == parent
    transition = start.transition
    assert (transition.parent_step, transition.rate_before) == (15, 0.25)
    assert transition.rate_after == 0.5 - 0.5 / 10
    assert transition.parent_manifest_sha256 == sha256_file(parent / MANIFEST)
    assert transition.sources_compared is False, "neither folder records its sources"


def record_sources(folder: Path, **parts: Any) -> str:
    """`sources.json` of a folder; its sha256."""
    write_synced(folder / "sources.json", json.dumps({"training": [], "held_out": [], **parts}))
    return sha256_file(folder / "sources.json")


def test_sources_are_compared_where_both_are_recorded(tmp_path: Path) -> None:
    """`sources_compared` is stated only of a comparison that was made, with the very data the stage
    before read.
    """
    for name, seed in (("first", 1), ("next", 9)):
        make_corpus(tmp_path / name, 2, seed=seed)
        used = {"training": [f"{name}.txt"]}
        rewrite(tmp_path / name, facts={"sources_sha256": record_sources(tmp_path / name, **used)})
    parent = Run(tmp_path / "parent", tmp_path / "first").checkpoint(2, 10)
    child = Run(tmp_path / "child", tmp_path / "next")
    assert child.start(run__init_from=str(parent)).transition.sources_compared is True
    shared = record_sources(tmp_path / "next", training=["first.txt"], held_out=["next.txt"])
    rewrite(tmp_path / "next", facts={"sources_sha256": shared})
    with pytest.raises(
        DataError, match=r"shares data with what was trained on before: source first\.txt"
    ):
        child.start(run__init_from=str(parent))
    allowed = child.start(run__init_from=str(parent), data__seen_before="allow").transition
    assert allowed.data_in_common == ("source first.txt",), "what is allowed is still recorded"
    rewrite(tmp_path / "first", facts={})
    assert child.start(run__init_from=str(parent)).transition.sources_compared is False


def record_texts(folder: Path, hashes: range) -> dict[str, Any]:
    """`texts.npy` of a folder; the fact that names it."""
    path = folder / "texts.npy"
    write_texts(path, np.array(hashes, dtype=np.uint64))
    return {"texts": {"file": path.name, "sha256": sha256_file(path), "count": len(hashes)}}


def test_the_seam_compares_texts(tmp_path: Path) -> None:
    """Catches documents of the stage before in a file that was cut anew, a file in common that is
    refused though no text of it is, and a comparison that is not named.
    """
    for name, seed, hashes in (("first", 1, range(100)), ("next", 9, range(90, 130))):
        make_corpus(tmp_path / name, 2, seed=seed)
        sources = {"sources_sha256": record_sources(tmp_path / name, training=["same.txt"])}
        rewrite(tmp_path / name, facts=sources | record_texts(tmp_path / name, hashes))
    parent = Run(tmp_path / "parent", tmp_path / "first").checkpoint(2, 10)
    child = Run(tmp_path / "child", tmp_path / "next")
    with pytest.raises(DataError, match=r"before: 10 of its 40 documents by text; .*`seen`"):
        child.start(run__init_from=str(parent))
    allowed = child.start(run__init_from=str(parent), data__seen_before="allow").transition
    assert allowed.data_in_common == ("10 of its 40 documents by text",)
    assert (allowed.sources_compared, allowed.data_compared) == (True, "all 40 texts")

    rewrite(tmp_path / "next", facts=sources | record_texts(tmp_path / "next", range(100, 130)))
    transition = child.start(run__init_from=str(parent)).transition
    assert (transition.data_in_common, transition.data_compared) == ((), "all 30 texts")


def test_the_seam_without_the_earlier_data(run: Run, tmp_path: Path) -> None:
    """The files of the stage before may be gone.

    The hashes in its checkpoint still tell a shared chunk.
    """
    shutil.copytree(run.data, tmp_path / "gone")
    earlier = Run(tmp_path / "earlier", tmp_path / "gone")
    parent = earlier.checkpoint(3, 15)
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(
        DataError, match="shares data with what was trained on before: chunk_000 is chunk_000"
    ):
        run.start(run__init_from=str(parent))
    make_corpus(tmp_path / "next", 2, seed=9)
    transition = (
        Run(tmp_path / "child", tmp_path / "next").start(run__init_from=str(parent)).transition
    )
    assert transition.sources_compared is False


def test_a_parent_that_makes_no_sense(run: Run, tmp_path: Path) -> None:
    """Catches a traceback over a manifest with a right hash: launchers start it again for ever."""
    make_corpus(tmp_path / "next", 2, seed=9)
    child = Run(tmp_path / "child", tmp_path / "next")
    for number, (facts, words) in enumerate(
        (
            ({"config": {}}, "does not say config.model"),
            ({"config": {"model": [1]}}, "does not say config.model"),
            ({"adam_steps": "many"}, "key 'adam_steps' must be a whole number"),
            ({"data": []}, "key 'data' must be an object"),
            ({"lr": "fast"}, "key 'lr' must be a number"),
            ({"identity": {}}, "identity: key 'model' is missing"),
        )
    ):
        parent = Run(tmp_path / f"parent{number}", run.data).checkpoint(3, 15, **facts)
        with pytest.raises(CheckpointError) as caught:
            child.start(run__init_from=str(parent))
        assert words in str(caught.value) and str(caught.value).isprintable()

    # Where its data were is not needed: the hashes are in the checkpoint.
    model = run.config().model_dump(mode="json")["model"]
    for number, data in enumerate((None, [], {"manifest": 3})):
        config = {"model": model, "data": data}
        parent = Run(tmp_path / f"data{number}", run.data).checkpoint(3, 15, config=config)
        transition = child.start(run__init_from=str(parent)).transition
        assert transition is not None and transition.sources_compared is False


def test_a_data_folder_is_no_checkpoint(run: Run) -> None:
    """It has a manifest.json as well."""
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run directory"):
        run.start(run__init_from=str(run.data))


def test_init_from_is_for_fresh_starts(run: Run) -> None:
    """A restart of stage 2 continues stage 2, whatever happened to its parent."""
    run.checkpoint(1, 5)
    start = run.start(run__init_from=str(run.folder / "gone"))
    assert start.parent is None and start.candidates


@pytest.mark.parametrize(
    ("name", "refused"), (("ckpt_003", True), ("ckpt_001", True), ("x", False))
)
def test_a_file_in_the_place_of_a_checkpoint(run: Run, name: str, refused: bool) -> None:
    """Catches a run that trains a whole chunk and then cannot save it, at every start again."""
    (run.directory / "checkpoints").mkdir(parents=True)
    (run.directory / "checkpoints" / name).touch()
    if refused:
        with pytest.raises(RunError, match=f"{name} is no checkpoint, but {name} is to be saved"):
            run.start()
        return
    assert not run.start().candidates


def test_saves_that_stay_make_no_room(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a disk that is planned as if kept saves were replaced."""
    asked: list[int] = []
    monkeypatch.setattr(
        checkpoints_ahead, "check_plan", lambda *a: asked.append(a[5] if len(a) > 5 else -1)
    )
    run.checkpoint(0, 0)
    ones = [run.checkpoint(0, step, numbered=False) for step in (2, 3)]
    run.start()
    (ones[0] / KEEP).touch()
    run.start()
    assert [inside for inside in asked if inside >= 0] == [1, 2]
