"""Runs on data with loss masks: losses and gradients of transformers, whatever the layout."""

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2train.checkpoint.manifest import read_manifest
from k2train.config.load import Config
from k2train.data.fed_ids import fingerprint_of_step
from k2train.data.inspect.fed_steps import fed_problems
from k2train.data.loss_mask import masked_as_asked
from k2train.data.manifest import read_manifest as read_data_manifest
from k2train.data.order import make_order
from k2train.data.trace.exposures import Stage
from k2train.guard.spike_verdict import SpikeVerdict
from k2train.hf.names import transformers_name
from k2train.launch.environment import Launch
from k2train.record.metrics import latest
from k2train.train import batch_again
from k2train.train.bundle_read import find_bundle
from k2train.train.spike_names import SEQUENCES
from k2train.train.trainer import Trainer
from tests.model.test_hugging_face import hugging_face
from tests.support.data_folder import flip, rehash
from tests.support.gloo_pool import GlooPool
from tests.support.masked_data import (
    GLOBAL,
    ROWS,
    SUBSETS,
    expected_losses,
    masked_folder,
    masked_microbatches,
    rows_of,
)
from tests.support.tiny_corpus import config_tree, train, trainer_job, tree_of, write_yaml
from tests.support.tiny_model import assemble, engine_of, grid_of, shapes_of, tiny_config, train_job
from tests.train.test_held_out import weights_job
from tools.recorded_run import open_run

TOLERANCE = 1e-5
"""Relative to the largest value of a tensor; see the layout law."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data` with masks, `plain` without."""
    folder = tmp_path_factory.mktemp("masked")
    masked_folder(folder / "data")
    masked_folder(folder / "plain", masked=False)
    return folder


def config_of(base: Path, **changes: Any) -> Any:
    given = {
        "data__manifest": str(base / "data" / "manifest.json"),
        "data__loss_mask": "use",
        "batch__global_sequences": GLOBAL,
        "batch__micro_sequences": 1,
        "optimizer__clip_norm": None,
    }
    return tiny_config(**{**given, **changes})


class Step:
    """The first step of a layout, put together from its ranks."""

    def __init__(self, pool: GlooPool, world: int, config: Any):
        parts = pool.run(world, train_job, config, 1, masked_microbatches)
        shapes = shapes_of(config)
        self.loss, self.norm, applied = parts[0]["results"][0]
        assert applied and all(part["results"] == parts[0]["results"] for part in parts)
        self.evaluated = parts[0]["held_out"]
        self.start = assemble([part["start"] for part in parts], shapes)
        self.gradients = assemble([part["gradients"][0] for part in parts], shapes)


class Expected:
    """The same by transformers and autograd: the sum over learned tokens through their number."""

    def __init__(self, config: Any, weights: dict[str, np.ndarray], blocked: bool = False):
        model = hugging_face(config, weights)
        ids, learned = (part[:GLOBAL] for part in rows_of(0))
        logits = model(
            torch.from_numpy(ids), attention_mask=documents() if blocked else None
        ).logits
        sums, targets = expected_losses(logits, ids, learned)
        loss = sums.sum() / targets.sum()
        loss.backward()
        self.loss, self.gradients = float(loss.detach()), dict(model.named_parameters())
        # What transformers itself makes of labels with -100.
        labels = torch.from_numpy(np.where(learned, ids, -100))
        if not blocked:
            theirs = float(model(torch.from_numpy(ids), labels=labels).loss.detach())
            assert self.loss == pytest.approx(theirs, rel=1e-6)


def documents() -> torch.Tensor:
    """Attention mask [GLOBAL, 1, s, s] of three documents a row, added to the scores."""
    index = torch.tensor([0] * 5 + [1] * 6 + [2] * 5)
    seen = (index[:, None] == index[None, :]).tril()
    hidden = torch.zeros(16, 16).masked_fill(~seen, torch.finfo(torch.float32).min)
    return hidden.expand(GLOBAL, 1, 16, 16)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-1": (1, {}),
    "micro-2": (1, {"batch__micro_sequences": 2, "kernels__loss": "reference"}),
    "micro-8": (1, {"batch__micro_sequences": 8}),
    "block": (1, {"data__cross_documents": "block", "batch__micro_sequences": 2}),
    "data-2": (2, {"batch__micro_sequences": 2}),
    "pipeline-2": (2, {"parallel__pipeline": 2}),
    "tensor-2": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "zb-v": (2, {"parallel__pipeline": 2, "parallel__schedule": "zb-v"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradients_are_those_of_transformers(
    base: Path, pool: GlooPool, name: str
) -> None:
    """Catches a mask that is dropped or shifted by a token in either direction, a mean of
    micro-batches' means, targets counted on one rank, and a layout that forgets one of it all.
    """
    world, changes = LAYOUTS[name]
    config = config_of(base, **changes)
    found = Step(pool, world, config)
    expected = Expected(config, found.start, blocked=name == "block")
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    for tensor, gradient in found.gradients.items():
        theirs = expected.gradients[transformers_name(tensor)].grad.numpy()
        error = np.abs(gradient - theirs).max() / np.abs(theirs).max()
        assert error <= TOLERANCE, f"gradient of {tensor}: relative error {error:.2e}"


def test_the_rows_show_each_mistake(base: Path) -> None:
    """Catches rows on which a wrong mean or a shifted mask would be right by chance."""
    ids, learned = (part[:GLOBAL] for part in rows_of(0))
    counts = learned.sum(axis=1)
    # Means of means, of rows, pairs of them and of halves, weigh the targets otherwise.
    for part in (1, 2, 4):
        assert len(set(counts.reshape(-1, part).sum(axis=1))) == GLOBAL // part
    assert not learned[:, 0].any() and (ids[learned] == 2).sum() == GLOBAL
    for row, mask in enumerate(learned):
        first, last = np.flatnonzero(mask)[[0, -1]]
        assert ids[row, last] == 2 and mask[first : last + 1].all()


EXACT: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-2": (1, {"batch__micro_sequences": 2}),
    "data-2": (2, {"batch__micro_sequences": 4}),
    "pipeline-2": (2, {"parallel__pipeline": 2, "batch__micro_sequences": 2}),
}


@pytest.fixture(scope="module")
def exact(base: Path, pool: GlooPool) -> Any:
    return cache(lambda: Step(pool, 1, config_of(base, run__exact=True)))


@pytest.mark.parametrize("name", EXACT)
def test_exact_sums_with_masks(base: Path, pool: GlooPool, exact: Any, name: str) -> None:
    """Catches a scale that depends on the micro-batch or the rank by a single bit."""
    world, changes = EXACT[name]
    one, found = exact(), Step(pool, world, config_of(base, run__exact=True, **changes))
    assert (found.loss, found.norm) == (one.loss, one.norm)
    for tensor, gradient in one.gradients.items():
        assert found.gradients[tensor].tobytes() == gradient.tobytes(), tensor
    expected = Expected(config_of(base), one.start)
    assert one.loss == pytest.approx(expected.loss, rel=TOLERANCE)


# Whole runs


def tree(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    given = {
        "batch": {"global_sequences": GLOBAL, "micro_sequences": 2},
        "data__loss_mask": "use",
        "audit__subset_losses": True,
        "audit__row_losses": True,
    }
    manifest = base / "data" / "manifest.json"
    return config_tree(manifest, base / "runs", name, **{**given, **changes})


@pytest.fixture(scope="module")
def whole(base: Path, pool: GlooPool) -> Path:
    """A run of all six steps."""
    assert pool.run(1, trainer_job, tree(base, "whole")) == [0]
    return base / "runs" / "whole"


def row_sums(base: Path, pool: GlooPool, path: Path, number: int) -> tuple[Any, Any]:
    """Summed loss and targets of each row of a chunk with the weights of a checkpoint."""
    one = Config.model_validate({**tree(base, "whole"), "parallel": {}})
    weights = assemble(pool.run(1, weights_job, one, str(path)), shapes_of(one))
    ids, learned = rows_of(number)
    with torch.no_grad():
        logits = hugging_face(one, weights).double()(torch.from_numpy(ids)).logits
    sums, targets = expected_losses(logits, ids, learned)
    return sums.numpy(), targets.numpy()


def by_part(sums: Any, targets: Any) -> dict[str, float]:
    """Mean loss by subset, over the targets of its own rows."""
    names = np.array(SUBSETS[: len(sums)])
    return {
        name: sums[names == name].sum() / targets[names == name].sum() for name in sorted({*names})
    }


def test_scores_and_metrics_are_means_of_what_is_learned(
    base: Path, pool: GlooPool, whole: Path
) -> None:
    """Catches a held-out loss, a loss of a subset or of a row through all of its positions."""
    start = whole / "checkpoints" / "ckpt_000"
    sums, targets = row_sums(base, pool, start, 2)
    (score,) = read_manifest(start).held_out or ()
    assert (score.rows, score.targets) == (ROWS, targets.sum())
    assert score.loss == pytest.approx(sums.sum() / targets.sum(), rel=TOLERANCE)
    expected = by_part(sums, targets)
    assert {part.name: part.loss for part in score.subsets} == pytest.approx(expected, rel=1e-5)

    sums, targets = (part[:GLOBAL] for part in row_sums(base, pool, start, 0))
    first, *later = latest(whole / "metrics.jsonl")
    assert first.targets == targets.sum() and first.consumed_tokens == GLOBAL * 16
    assert first.loss == pytest.approx(sums.sum() / targets.sum(), rel=TOLERANCE)
    assert first.subsets is not None
    found = {name: loss for name, (_, loss) in first.subsets.items()}
    assert found == pytest.approx(by_part(sums, targets), rel=TOLERANCE)
    assert [record.targets for record in later] == [
        rows_of(step // 3)[1][step % 3 * GLOBAL :][:GLOBAL].sum() for step in range(1, 6)
    ]


def test_the_record_of_a_step_holds_its_labels(base: Path, tmp_path: Path, whole: Path) -> None:
    """Catches a mask that was exchanged while a run read it and then put back: the rows' ids are
    the same.
    """
    manifest, records = read_data_manifest(base / "data"), latest(whole / "metrics.jsonl")
    ids, learned = (part[:GLOBAL] for part in rows_of(0))
    labels = np.where(learned, ids, -100)
    assert records[0].ids == fingerprint_of_step(np.concatenate((ids, labels), axis=1))
    assert list(fed_problems(manifest, records)) == []

    shutil.copytree(base / "data", tmp_path / "data")
    path = tmp_path / "data" / "chunk_000.mask.npy"
    stored = np.load(path)
    stored[[GLOBAL, GLOBAL + 1]] = stored[[GLOBAL + 1, GLOBAL]]
    np.save(path, stored)
    (problem,) = fed_problems(read_data_manifest(tmp_path / "data"), records)
    assert "1 step was fed other ids" in problem and "the first is step 2" in problem


def test_a_row_that_was_traced_has_its_own_mean(base: Path, pool: GlooPool, whole: Path) -> None:
    """Catches the loss of a row through all of its positions, where its uses are looked up."""
    sums, targets = row_sums(base, pool, whole / "checkpoints" / "ckpt_000", 0)
    run = open_run(whole)
    for row in (0, 7):
        (use,) = Stage(run).exposures("chunk_000", row)
        assert use.sequence_loss == pytest.approx(sums[row] / targets[row], rel=TOLERANCE)


def alarm(trainer: Trainer) -> None:
    """Raise an alarm at step 2, whatever the step was."""

    def spikes(state: Any, result: Any, lr: float) -> list[SpikeVerdict]:
        facts = {"onset": 2, "step": 2, "usual_loss": 3.0, "channels": ("loss",)}
        found = SpikeVerdict(kind="opened", steps=1, loss=result.loss, loss_z=9.0, **facts)
        return [found] if state.step == 2 else []

    trainer.report.spikes = spikes  # type: ignore[method-assign]


def test_a_spikes_rows_have_their_own_means(base: Path, pool: GlooPool) -> None:
    """Catches a row with one target that looks harmless beside rows with many."""
    settings = tree(base, "spiked", run__stop_after_steps=2)
    assert pool.run(1, trainer_job, settings, alarm) == [75]
    run = base / "runs" / "spiked"
    sums, targets = row_sums(base, pool, run / "checkpoints" / "ckpt_000_step_000002", 0)
    found = {row["row"]: row["loss"] for row in find_bundle(run, "1").lines_of(SEQUENCES)}
    expected = {row: sums[row] / targets[row] for row in range(GLOBAL, 2 * GLOBAL)}
    assert found == pytest.approx(expected, rel=1e-4)


def measured_job(launch: Launch, settings: dict[str, Any]) -> list[float]:
    """Losses of the first two steps as the bisection of a spike computes them."""
    config = Config.model_validate(settings)
    engine, data = engine_of(config, grid_of(launch, config)), config.data
    manifest = masked_as_asked(read_data_manifest(data.manifest), data.loss_mask)
    order = make_order(manifest, None, GLOBAL)
    return [one.loss for one in batch_again._measure(engine, manifest, order, [1, 2])]


def test_a_batch_again_is_divided_by_its_targets(base: Path, pool: GlooPool, whole: Path) -> None:
    """Catches the cause of a spike judged by another loss than the run's."""
    (found,) = pool.run(1, measured_job, tree(base, "again"))
    sums, targets = row_sums(base, pool, whole / "checkpoints" / "ckpt_000", 0)
    for step, loss in enumerate(found):
        rows = slice(step * GLOBAL, (step + 1) * GLOBAL)
        assert loss == pytest.approx(sums[rows].sum() / targets[rows].sum(), rel=TOLERANCE)


def test_a_resume_is_the_undisturbed_run(base: Path, pool: GlooPool, whole: Path) -> None:
    """Catches targets, or labels, that a start inside a chunk reads otherwise."""
    settings = tree(base, "halves")
    for steps, code in ((2, 75), (2, 75), (None, 0)):
        settings["run"]["stop_after_steps"] = steps
        assert pool.run(1, trainer_job, settings) == [code]
    halves = base / "runs" / "halves"
    for folder in ("model", "optimizer"):
        found, expected = (
            tree_of(run / "checkpoints" / "ckpt_002" / folder) for run in (halves, whole)
        )
        assert found == expected
    assert [(r.loss, r.targets) for r in latest(halves / "metrics.jsonl")] == [
        (r.loss, r.targets) for r in latest(whole / "metrics.jsonl")
    ]


def test_another_value_is_another_run(base: Path, pool: GlooPool) -> None:
    """Catches a run that goes on with every token, or with other masks, as if it were the same."""
    settings = tree(base, "changed", run__stop_after_steps=2)
    assert pool.run(1, trainer_job, settings) == [75]
    settings["data"]["loss_mask"] = "ignore"
    (told,) = pool.run(1, trainer_job, settings)
    assert "data.loss_mask: use -> ignore" in told and "run.allow=[data.loss_mask" in told
    settings["data"] |= {"loss_mask": "none", "manifest": str(base / "plain" / "manifest.json")}
    (told,) = pool.run(1, trainer_job, settings)
    assert "data.loss_mask: use -> none" in told


def test_ignored_masks_change_nothing(base: Path, pool: GlooPool) -> None:
    """Catches masks that are used in spite of the key: the run is that of the same rows without."""
    losses = []
    for data, value in (("data", "ignore"), ("plain", "none")):
        settings = tree(base, value, data__loss_mask=value, run__stop_after_steps=2)
        settings["data"]["manifest"] = str(base / data / "manifest.json")
        assert pool.run(1, trainer_job, settings) == [75]
        rows = latest(base / "runs" / value / "metrics.jsonl")
        losses.append([row.loss for row in rows])
        assert [row.targets for row in rows] == [None, None]
        (score,) = read_manifest(base / "runs" / value / "checkpoints" / "ckpt_000").held_out or ()
        assert score.targets == ROWS * 15
    assert losses[0] == losses[1]


def test_data_of_the_base_is_scored_whole(base: Path, pool: GlooPool) -> None:
    """Catches a held-out set without masks that is refused, or one with masks that is not read by
    them; and masks of a set that a run without masks says nothing of.
    """
    sets = {"earlier": str(base / "plain" / "manifest.json")}
    settings = tree(base, "sets", data__held_out_sets=sets, run__stop_after_steps=1)
    assert pool.run(1, trainer_job, settings) == [75]
    own, other = read_manifest(base / "runs" / "sets" / "checkpoints" / "ckpt_000").held_out or ()
    assert (own.targets, other.targets) == (rows_of(2)[1].sum(), ROWS * 15)

    settings = tree(base, "unasked", data__loss_mask="none")
    settings["data"] |= {
        "manifest": sets["earlier"],
        "held_out_sets": {"chat": str(base / "data" / "manifest.json")},
    }
    (told,) = pool.run(1, trainer_job, settings)
    assert told.startswith("DataError: data.held_out_sets.chat: ") and "has loss masks" in told


def damaged(base: Path, tmp_path: Path, name: str) -> tuple[Path, str]:
    """A folder with a fault, and the value of the key that it is started with."""
    folder = tmp_path / "data"
    shutil.copytree(base / ("plain" if name == "use-plain" else "data"), folder)
    mask, manifest = folder / "chunk_001.mask.npy", folder / "manifest.json"
    if name == "missing":
        mask.unlink()
    if name == "cut":
        mask.write_bytes(mask.read_bytes()[:-3])
    if name == "changed":
        flip(mask, -1)
    if name == "empty row":
        stored = np.load(mask)
        stored[5] = 0
        np.save(mask, stored)
        rehash(read_data_manifest(manifest))
    if name == "mixed":
        content = json.loads(manifest.read_text())
        for key in ("loss_mask", "loss_mask_sha256", "targets"):
            del content["chunks"][1][key]
        manifest.write_text(json.dumps(content))
    return manifest, "none" if name == "none-masked" else "use"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", r"chunk_001 \(.*mask\.npy\): cannot be read"),
        ("cut", r"chunk_001 \(.*mask\.npy\): truncated"),
        ("changed", r"chunk_001 \(.*mask\.npy\): .*sha256 is"),
        ("empty row", r"chunk_001 \(.*\): row 5 of the loss mask has no target"),
        ("mixed", r"2 of 3 chunks have a loss mask, these have none: chunk_001"),
        ("none-masked", r"data\.loss_mask is none: data\.loss_mask=use learns"),
        ("use-plain", r"has no loss masks, but data\.loss_mask is use"),
    ],
)
def test_bad_masks_end_a_start_with_one_line(
    base: Path, tmp_path: Path, name: str, message: str
) -> None:
    """Catches a traceback, another exit code, and a run directory that is left behind."""
    manifest, value = damaged(base, tmp_path, name)
    settings = tree(base, "bad", data__loss_mask=value)
    settings["data"]["manifest"] = str(manifest)
    settings["run"]["directory"] = str(tmp_path / "runs")
    done = train(write_yaml(tmp_path / "c.yaml", settings))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "runs").exists()
