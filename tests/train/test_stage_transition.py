"""Stages that start from another run: what was trained on, what is finished, what may change."""

import shutil
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2train.checkpoint.manifest import read_manifest
from k2train.config.load import Config
from k2train.data.manifest import Manifest
from k2train.data.tokenizer import Tokenizer
from k2train.data.tokenizer_training import train_tokenizer
from k2train.errors import CheckpointError, DataError
from k2train.files import sha256_file, write_synced
from k2train.record.event import Event
from k2train.record.events import Resumed, StageTransition, of_kind
from k2train.record.ledger import read_ledger
from k2train.train.preflight import Start, prepare_start
from tests.support.data_folder import rewrite
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import (
    GLOBAL,
    STEPS_PER_CHUNK,
    config_tree,
    make_corpus,
    train,
    trainer_job,
    tree_of,
    write_yaml,
)
from tests.support.tiny_model import TINY
from tests.train.test_held_out import row_losses

CONSTANT = {"kind": "constant", "peak": 1e-2}
DECAY = {"kind": "linear", "peak": 1e-2, "final": 0.0}
SPLIT = {"batch__micro_sequences": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pool: GlooPool) -> Path:
    """`runs/plateau`: constant over five chunks, stopped in the fourth."""
    folder = tmp_path_factory.mktemp("stages")
    make_corpus(folder / "data", 5)
    steps = 3 * STEPS_PER_CHUNK + 2
    settings = tree(folder, "plateau", lr=CONSTANT, run__stop_after_steps=steps)
    assert pool.run(1, trainer_job, settings) == [75]
    return folder


def tree(base: Path, name: str, data: str = "data", **changes: Any) -> dict[str, Any]:
    changes = {**SPLIT, **changes}
    return config_tree(base / data / "manifest.json", base / "runs", name, **changes)


def start(base: Path, name: str, **changes: Any) -> Start:
    return prepare_start(Config.model_validate(tree(base, name, **changes)), 1, verify=False)


def checkpoint(base: Path, run: str, name: str) -> str:
    return str(base / "runs" / run / "checkpoints" / name)


def events(base: Path, run: str, kind: type[Any]) -> list[Any]:
    return of_kind(read_ledger(base / "runs" / run / "ledger.jsonl"), kind)


def test_decays_branch_off_a_plateau(base: Path, pool: GlooPool) -> None:
    """The usual use of a plateau, several branches side by side.

    Catches chunks that count as seen because they were planned, and a record that says so.
    """
    before = tree_of(base / "runs" / "plateau")
    for name, peak in (("decay_a", 1e-2), ("decay_b", 5e-3)):
        settings = tree(
            base,
            name,
            run__init_from=checkpoint(base, "plateau", "ckpt_002"),
            data__order=[3, 4],
            lr={**DECAY, "peak": peak},
        )
        assert pool.run(1, trainer_job, settings) == [0]
        (seam,) = events(base, name, StageTransition)
        assert (seam.data_in_common, seam.sources_compared) == ((), True)
        assert (seam.parent_step, seam.rate_before) == (10, 1e-2)
        assert (seam.parent_finished, seam.parent_total_steps, seam.total_steps) == (False, 25, 10)
        assert seam.rate_after == pytest.approx(peak * 0.9)
    assert tree_of(base / "runs" / "plateau") == before


@pytest.mark.parametrize(
    ("parent", "order", "seen"),
    (
        ("ckpt_002", [2, 3], []),
        ("ckpt_002", [3, 1, 0], ["chunk_001", "chunk_000"]),
        ("ckpt_003", [3], []),
        # Inside the fourth chunk: two of its steps were trained.
        ("ckpt_003_step_000017", [3, 4], ["chunk_003"]),
        ("ckpt_003_step_000017", [4], []),
        ("ckpt_000", [0, 1, 2, 3, 4], []),
    ),
)
def test_what_was_consumed_is_what_was_seen(
    base: Path, parent: str, order: list[int], seen: list[str]
) -> None:
    """Catches a chunk that is read twice unnoticed, and one that nobody has read refused."""
    changes = {
        "run__init_from": checkpoint(base, "plateau", parent),
        "data__order": order,
        "lr": CONSTANT,
    }
    if seen:
        with pytest.raises(DataError, match="shares data with what was trained on before") as one:
            start(base, "branch", **changes)
        assert [f"{n} is {n} of the stage before" in str(one.value) for n in seen] == [True] * len(
            seen
        )
    begun = start(base, "branch", data__seen_before="allow", **changes)
    assert begun.transition is not None
    expected = tuple(f"{name} is {name} of the stage before" for name in seen)
    assert begun.transition.data_in_common == expected


def test_the_stages_before_the_stage_before_count(base: Path, pool: GlooPool) -> None:
    """Catches a chunk of the plateau that is trained again behind its decay."""
    parent = checkpoint(base, "plateau", "ckpt_002")
    settings = tree(base, "tail", run__init_from=parent, data__order=[3], lr=DECAY)
    assert pool.run(1, trainer_job, settings) == [0]
    third = {"run__init_from": str(base / "runs" / "tail"), "lr": CONSTANT}
    with pytest.raises(DataError) as caught:
        start(base, "third", data__order=[0, 3], **third)
    assert "chunk_000 is chunk_000 of an earlier stage (plateau, ckpt_002)" in str(caught.value)
    assert "chunk_003 is chunk_003 of the stage before" in str(caught.value)
    assert start(base, "third", data__order=[2, 4], **third).parent is not None


def moved(base: Path, folder: Path, **infos: str) -> Manifest:
    """Another folder, some of whose chunks are those of `data` under another name."""
    make_corpus(folder, 1, seed=9)
    for name, other in infos.items():
        shutil.copy(base / "data" / f"{other}.npy", folder / f"{name}.npy")
    data = start(base, "any", lr=CONSTANT).manifest
    here = {name: data.chunk(other) for name, other in infos.items()}
    changed = {n: i.model_copy(update={"name": n, "file": f"{n}.npy"}) for n, i in here.items()}
    held_out = changed.pop("held_out", None)
    changes: dict[str, Any] = {"chunks": list(changed.values())} if changed else {}
    return rewrite(folder, **changes, **({"held_out": held_out} if held_out else {}))


@pytest.mark.parametrize(
    ("chunks", "refused"),
    (
        ({"chunk_000": "held_out"}, False),
        ({"chunk_000": "chunk_004"}, False),
        ({"chunk_000": "chunk_001"}, True),
        ({"held_out": "chunk_001"}, True),
        ({"held_out": "chunk_004"}, False),
    ),
    ids=str,
)
def test_held_out_rows_were_not_trained_on(
    base: Path, tmp_path: Path, chunks: dict[str, str], refused: bool
) -> None:
    """Catches a held-out chunk that counts as trained, and rows to be held out that were trained on
    before, whose loss would flatter.
    """
    moved(base, tmp_path / "data", **chunks)
    parent = checkpoint(base, "plateau", "ckpt_002")
    settings = tree(tmp_path, "next", run__init_from=parent, lr={**CONSTANT, "warmup_steps": 0})
    settings["batch"]["global_sequences"] = GLOBAL
    config = Config.model_validate(settings)
    if not refused:
        assert prepare_start(config, 1, verify=False).parent is not None
        return
    with pytest.raises(DataError, match=f"{next(iter(chunks))} is chunk_001 of the stage before"):
        prepare_start(config, 1, verify=False)


def test_sources_of_a_folder_read_in_part(base: Path, tmp_path: Path, pool: GlooPool) -> None:
    """Catches a record that says a file was trained on when that is not known."""
    for name, seed, text in (("first", 1, "a"), ("next", 9, "a")):
        make_corpus(tmp_path / name, 2, seed=seed)
        sources = tmp_path / name / "sources.json"
        write_synced(sources, f'{{"training": ["{text}.txt"], "held_out": []}}')
        from_hash = sha256_file(sources)
        rewrite(tmp_path / name, facts={"sources_sha256": from_hash})
    settings = tree(tmp_path, "first", "first", lr=CONSTANT, run__stop_after_steps=5)
    assert pool.run(1, trainer_job, settings) == [75]
    parent = checkpoint(tmp_path, "first", "ckpt_001")
    with pytest.raises(DataError) as caught:
        start(tmp_path, "next", data="next", run__init_from=parent, lr=CONSTANT)
    assert str(caught.value).count("as a whole") == 1
    words = "source a.txt (of its data as a whole, 1 of 2 chunks were read)"
    assert words in str(caught.value)
    # Of the later folder as well.
    part = {"data__order": [1], "run__init_from": parent, "lr": CONSTANT}
    with pytest.raises(DataError) as caught:
        start(tmp_path, "next", data="next", **part)
    words += " (of this stage's data as a whole, 1 of 2 chunks will be read)"
    assert words in str(caught.value)


def test_an_unfinished_run_is_no_stage_before(base: Path) -> None:
    """Catches a chain of jobs whose second stage starts wherever the first one was cut off."""
    run = base / "runs" / "plateau"
    changes = {"data__order": [4], "lr": CONSTANT, "run__init_from": str(run)}
    with pytest.raises(CheckpointError) as caught:
        start(base, "chained", **changes)
    for words in (
        "is a run that is not finished",
        "ckpt_003_step_000017, step 17 of 25, 3 of 5 chunks consumed",
        "run.allow=[unfinished_parent]",
        f"run.init_from={run}/checkpoints/ckpt_003_step_000017",
    ):
        assert words in str(caught.value)
    allowed = start(base, "chained", run__allow=["unfinished_parent"], **changes)
    assert allowed.parent is not None and allowed.parent.name == "ckpt_003_step_000017"
    assert allowed.transition is not None and allowed.transition.parent_finished is False


def test_a_start_says_where_it_stands(base: Path) -> None:
    """Catches a stage that starts from half a run, at another rate, without a word."""
    parent = checkpoint(base, "plateau", "ckpt_001")
    settings = tree(
        base,
        "told",
        run__init_from=parent,
        data__order=[1],
        data__seen_before="allow",
        lr=DECAY,
        run__stop_after_steps=2,
    )
    path = write_yaml(base / "told.yaml", settings)
    first = train(path)
    assert first.returncode == 75, first.stderr
    assert "the stage before was not finished: that is its step 5 of 25" in first.stderr
    assert "next is step 1 of 5, at rate 0.008 (the last was 0.01)" in first.stderr
    again = train(path)
    assert "next is step 3 of 5, at rate 0.004 (the last was 0.006)" in again.stderr
    assert "the schedule changes" not in again.stderr
    (resumed,) = events(base, "told", Resumed)
    assert (resumed.total_steps, resumed.total_steps_before) == (5, 5)
    assert resumed.rate_before == resumed.rate_next == pytest.approx(0.004)
    assert resumed.rate_last == pytest.approx(0.006)


def cosine(step: int, total: int, peak: float = 1e-2, final: float = 1e-3, warm: int = 3) -> float:
    """By hand; for steps after the warm-up."""
    return final + (peak - final) * (1 + cos(pi * (step - warm) / (total - warm))) / 2


def test_an_allowed_change_says_what_becomes_of_the_rate(base: Path) -> None:
    """Catches a finished schedule that is extended and jumps up, and another peak, silently."""
    settings = tree(base, "extended", data__order=[0, 1], run__stop_after_steps=7)
    path = write_yaml(base / "extended.yaml", settings)
    assert train(path).returncode == 75
    peak = train(path, "lr.peak=0.02", "run.allow=[lr.peak]", "run.stop_after_steps=3")
    old, new = cosine(8, 10), cosine(8, 10, 2e-2)
    assert (
        f"the schedule changes: step 8 was to have rate {old:.4g} of a stage of 10 steps, and has "
        f"{new:.4g}"
    ) in peak.stderr
    longer = train(
        path,
        "lr.peak=0.02",
        "data.order=[0,1,2]",
        "run.allow=[data.order]",
        "run.stop_after_steps=1",
    )
    jump = cosine(11, 15, 2e-2)
    assert (
        f"the schedule changes: it ended with step 10, and goes on at rate {jump:.4g}"
    ) in longer.stderr
    first, second = events(base, "extended", Resumed)
    assert (first.rate_before, first.rate_next) == pytest.approx((old, new))
    assert first.rate_last == pytest.approx(cosine(7, 10))
    assert (second.rate_before, second.total_steps_before, second.total_steps) == (None, 10, 15)
    assert second.rate_next == pytest.approx(jump) and second.rate_last == pytest.approx(1e-3)


def test_a_next_stage_may_have_another_base_of_the_positions(base: Path, pool: GlooPool) -> None:
    """Hugging Face with the parent's weights and the new base has the same loss.

    Catches a base that is refused for good, one that changes unasked, one that is not used, and
    weights that are not checked because of it.
    """
    parent = checkpoint(base, "plateau", "ckpt_001")
    changes = {
        "run__init_from": parent,
        "data__order": [1],
        "lr": CONSTANT,
        "model__rope_theta": 50.0,
        "run__stop_after_steps": 1,
    }
    with pytest.raises(
        CheckpointError, match=r"rope_theta: 10000.0 -> 50.0; allow it by name: run"
    ):
        start(base, "longer", **changes)
    with pytest.raises(CheckpointError, match=r"another model: model.norm_eps: 1.0e-05 -> 0.5$"):
        allow = ["model.rope_theta", "model.norm_eps"]
        start(base, "longer", model__norm_eps=0.5, run__allow=allow, **changes)
    settings = tree(base, "longer", run__allow=["model.rope_theta"], **changes)
    assert pool.run(1, trainer_job, settings) == [75]
    (seam,) = events(base, "longer", StageTransition)
    assert seam.allowed == ("model.rope_theta: 10000.0 -> 50.0",)
    ids = np.load(base / "data" / "held_out.npy")
    new = row_losses(pool, settings, Path(parent), ids)
    old = row_losses(pool, tree(base, "plateau", lr=CONSTANT), Path(parent), ids)
    found = read_manifest(Path(checkpoint(base, "longer", "ckpt_000"))).held_out_loss
    assert found == pytest.approx(np.mean(new), rel=1e-5)
    assert abs(np.mean(old) - np.mean(new)) > 1e-4 * np.mean(new)
    # It goes on without being asked again.
    settings["run"].pop("allow")
    assert pool.run(1, trainer_job, settings) == [75]
    kinds = [type(event) for event in events(base, "longer", Event)]
    assert kinds.count(StageTransition) == 1 and kinds.count(Resumed) == 1


MARKERS = ("<|beginofuser|>", "<|endofchat|>")


def chat_folder(folder: Path, tokenizer: Tokenizer) -> None:
    """A data folder with the tokenizer's file."""
    made = make_corpus(folder, 1, seed=9, vocab=tokenizer.vocab_size, tokenizer=tokenizer.sha256)
    tokenizer.save(folder / "tokenizer.model")
    facts = {"tokenizer": {"file": "tokenizer.model", **tokenizer.facts}}
    rewrite(folder, facts=facts, chunks=made.chunks)


def test_more_special_tokens_behind_those_of_the_parent(tmp_path: Path, pool: GlooPool) -> None:
    """Catches fine-tuning that is refused for the markers of its turns, markers that are not said,
    and a tokenizer of another order let through.
    """
    base = train_tokenizer(["a text of some words, which say little\n" * 3], 300)
    vocab = base.vocab_size
    make_corpus(tmp_path / "data", 1, vocab=vocab, tokenizer=base.sha256)
    longer = {**TINY["model"], "vocab_size": vocab + 8}
    settings = tree(tmp_path, "base", model=longer, lr=CONSTANT)
    assert pool.run(1, trainer_job, settings) == [0]

    more = Tokenizer(base.model, (*base.specials, *MARKERS))
    chat_folder(tmp_path / "chat", more)
    changes = {"model": longer, "lr": CONSTANT, "run__init_from": str(tmp_path / "runs" / "base")}
    settings = tree(tmp_path, "tuned", "chat", run__stop_after_steps=1, **changes)
    done = train(write_yaml(tmp_path / "tuned.yaml", settings))
    assert done.returncode == 75, done.stderr
    assert f"special tokens that the stage before did not have: {', '.join(MARKERS)}" in done.stderr
    (seam,) = events(tmp_path, "tuned", StageTransition)
    assert (seam.same_tokenizer, seam.added_specials) == (True, MARKERS)

    chat_folder(tmp_path / "other", Tokenizer(base.model, (*MARKERS, *base.specials)))
    with pytest.raises(DataError, match=r"was trained with .*; prepare the data with the same one"):
        prepare_start(
            Config.model_validate(tree(tmp_path, "moved", "other", **changes)), 1, verify=False
        )
