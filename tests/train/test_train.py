"""Whole runs: their record, the stage transition, non-finite steps, full and failing disks.

Tests of the process use the command line, tests of the trainer the process pool.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from k2train import fault_injection
from k2train.checkpoint.manifest import list_checkpoints
from k2train.checkpoint.verify import verify_checkpoint
from k2train.config.load import flat_values, load_config
from k2train.data.loader import MicroBatch
from k2train.errors import DataError, RunError
from k2train.record.event import Event
from k2train.record.events import (
    CheckpointSaved,
    CheckpointVerified,
    ChunkStarted,
    E,
    Finished,
    StageTransition,
    Started,
    Starting,
    StepSkipped,
    Stopped,
    of_kind,
)
from k2train.record.ledger import read_ledger
from k2train.record.metrics import StepRecord, latest, read_metrics
from k2train.run_lock.lock import RunLock
from k2train.train.host_memory import malloc_settings
from k2train.train.rank_zero_logger import RankZeroRunLogger
from k2train.train.trainer import Trainer
from tests.support.command_line import HANG_SECONDS
from tests.support.gloo_pool import GlooPool
from tests.support.recorded import step_rows
from tests.support.tiny_corpus import (
    GLOBAL,
    ROOT,
    STEPS_PER_CHUNK,
    cold_train,
    config_tree,
    environment,
    kept_of,
    kill_all,
    make_corpus,
    manifest_of,
    start,
    train,
    trainer_job,
    wait_for,
    write_yaml,
)

sys.path.insert(0, str(ROOT / "tools"))
import compare_runs

METRICS = {
    "step",
    "attempt",
    "chunk",
    "consumed_tokens",
    "loss",
    "grad_norm",
    "lr",
    "rows",
    "ids",
    "applied",
    "tokens_per_second",
    "mfu",
    "seconds",
    "peak_memory_bytes",
    "device",
}
STEP_LINE = re.compile(r"step (\d+)/\d+ loss (\S+) grad_norm (\S+) lr (\S+)")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    make_corpus(folder / "data", 2)
    make_corpus(folder / "data2", 1, seed=2)
    return folder


def tree(base: Path, name: str, data: str = "data", **changes: Any) -> dict[str, Any]:
    return config_tree(base / data / "manifest.json", base / "runs", name, **changes)


def events(run: Path, kind: type[E]) -> list[E]:
    return of_kind(read_ledger(run / "ledger.jsonl"), kind)


@pytest.fixture(scope="module")
def plain(base: Path) -> dict[str, Any]:
    """One process, to the end; path of its config, the finished process, its run directory."""
    path = write_yaml(base / "plain.yaml", tree(base, "plain"))
    return {"path": path, "done": train(path), "run": base / "runs" / "plain"}


def assert_record(run: Path, done: Any, path: Path, steps: int) -> None:
    """Metrics, ledger, config and console of a finished run agree."""
    rows = read_metrics(run / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, steps + 1))
    lines = step_rows(run / "metrics.jsonl")
    assert all(line.keys() == METRICS | {"check"} for line in lines)
    assert [row.consumed_tokens for row in rows] == [row.step * GLOBAL * 16 for row in rows]
    # Of all ranks together, whatever their number.
    assert all(
        row.tokens_per_second * row.seconds == pytest.approx(GLOBAL * 16, rel=1e-9) for row in rows
    )
    within = [(row.step - 1) % STEPS_PER_CHUNK * GLOBAL for row in rows]
    assert [row.rows for row in rows] == [[first, first + GLOBAL] for first in within]
    folder = Path(load_config(str(path)).data.manifest).parent
    for row in rows:
        # The chunk with NumPy, and the hash by its published formula.
        ids = np.load(folder / f"{row.chunk}.npy")[slice(*row.rows)].astype("<u4")
        hashes = [xxhash.xxh3_64(part.tobytes(), seed=i).intdigest() for i, part in enumerate(ids)]
        assert row.ids == f"{sum(hashes) % 2**64:016x}"
    shown = {int(m[1]): m.groups()[1:] for m in STEP_LINE.finditer(done.stderr)}
    assert 1 in shown, done.stderr
    for row in rows:
        if row.step in shown:
            loss, norm, lr = (float(text) for text in shown[row.step])
            assert loss == pytest.approx(row.loss, abs=6e-5)
            assert norm == pytest.approx(row.grad_norm, rel=6e-3)
            assert lr == pytest.approx(row.lr, rel=6e-3)
    # The cut that was chosen stands in the record.
    config = load_config(str(path), ["parallel.layers_per_stage=null"])
    assert flat_values(load_config(str(run / "config.yaml"))) == flat_values(config)
    kinds = [type(event) for event in events(run, Event)]
    assert kinds[:2] == [Starting, Started] and kinds[-1] is Finished
    chunks = steps // STEPS_PER_CHUNK
    assert kinds.count(ChunkStarted) == chunks and kinds.count(CheckpointSaved) == chunks + 1
    assert all(event.dropped_rows == 3 for event in events(run, ChunkStarted))
    for event in events(run, CheckpointSaved):
        manifest = verify_checkpoint(run / "checkpoints" / event.checkpoint)
        for key in ("step", "held_out_loss", "loss", "consumed_tokens"):
            assert getattr(manifest, key) == getattr(event, key)
        assert event.loss == (rows[event.step - 1].loss if event.step else None)
        assert manifest.lr == (rows[event.step - 1].lr if event.step else None)
    assert not (run / "run.lock").exists() or (run / "run.lock").stat().st_size == 0


def test_what_a_run_leaves_behind(plain: dict[str, Any]) -> None:
    """Every file of the run directory, each consistent with the others."""
    assert plain["done"].returncode == 0, plain["done"].stderr
    assert_record(plain["run"], plain["done"], plain["path"], 2 * STEPS_PER_CHUNK)
    assert plain["done"].stdout == ""
    setting = "malloc: set by" if malloc_settings(os.environ) else "malloc: freed memory is kept"
    assert setting in plain["done"].stderr
    (started,) = events(plain["run"], Started)
    assert started.memory is not None and started.memory.startswith(setting)
    assert "matmul" in started.kernels


def test_finished_is_finished(plain: dict[str, Any]) -> None:
    """Started again, it says so, exits 0 and changes nothing but who was there last: a requeued job
    must not train past the data.
    """

    before = kept_of(plain["run"])
    done = train(plain["path"])
    assert (done.returncode, done.stderr) == (0, "")
    assert "ckpt_002 is the last checkpoint: this stage is finished" in done.stdout
    assert kept_of(plain["run"]) == before


def test_torchrun_leaves_the_same_record(base: Path, plain: dict[str, Any]) -> None:
    """Two pipeline stages: rank 0 has no loss of its own, and still shows and writes the true one,
    to the same bits.
    """
    path = write_yaml(base / "pipeline.yaml", tree(base, "pipeline", parallel__pipeline=2))
    done = cold_train(path, processes=2)
    assert done.returncode == 0, done.stderr
    assert_record(base / "runs" / "pipeline", done, path, 2 * STEPS_PER_CHUNK)
    losses = [
        [r.loss for r in latest(run / "metrics.jsonl")]
        for run in (plain["run"], base / "runs" / "pipeline")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("world", "layout"), ((4, {"parallel__tensor": 2, "parallel__pipeline": 2}), (3, {}))
)
def test_any_layout_leaves_the_same_record(
    base: Path, pool: GlooPool, plain: dict[str, Any], world: int, layout: dict[str, int]
) -> None:
    """Losses, held-out losses and rates within rounding of one process."""
    name = f"layout-{world}"
    assert (
        pool.run(world, trainer_job, tree(base, name, batch__micro_sequences=2, **layout))
        == [0] * world
    )
    run = base / "runs" / name
    for mine, other in zip(
        latest(run / "metrics.jsonl"), latest(plain["run"] / "metrics.jsonl"), strict=True
    ):
        assert mine.loss == pytest.approx(other.loss, rel=1e-5)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert (mine.lr, mine.chunk, mine.ids) == (other.lr, other.chunk, other.ids)
    for mine, other in zip(
        events(run, CheckpointSaved), events(plain["run"], CheckpointSaved), strict=True
    ):
        assert mine.held_out_loss == pytest.approx(other.held_out_loss, rel=1e-5)


@dataclass
class FedOther:
    """Gives one rank another id than the chunk holds, in step 3, after all checks of the file."""

    rank: int

    def __call__(self, trainer: Trainer) -> None:
        loader = trainer.batches.loader
        read = loader.step

        def step(number: int) -> list[MicroBatch]:
            batch = read(number)
            if number == 3:
                batch[0].tokens[0, 0] ^= 1
            return batch

        if trainer.engine.grid.rank == self.rank:
            loader.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("rank", [0, 1])
def test_replicas_that_are_fed_different_ids_stop_the_run(
    base: Path, pool: GlooPool, rank: int
) -> None:
    """Catches two tensor-parallel ranks that train on different rows, with nobody the wiser."""
    changed = tree(base, f"fed-{rank}", parallel__tensor=2)
    assert pool.run(2, trainer_job, changed, FedOther(rank)) == [1, 1]
    run = base / "runs" / f"fed-{rank}"
    (stopped,) = events(run, Stopped)
    assert stopped.reason == "damaged" and stopped.problem is not None
    assert "step 3: ranks that read the same rows of chunk_000 were fed" in stopped.problem
    assert [row.step for row in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["ckpt_000"]


def optimizer_of(checkpoint: Path) -> dict[str, bytes]:
    return {
        name: values.tobytes()
        for name, values in compare_runs.tensors_of(checkpoint, "optimizer").items()
    }


def test_the_seam_between_stages(base: Path, pool: GlooPool, plain: dict[str, Any]) -> None:
    """Weights and moments are kept to the bit, on another grid too.

    The optimizer goes on counting; the first rate is the new schedule's; a step at a rate of almost
    nothing leaves the weights as they were (a stale master would not).
    """
    parent = plain["run"] / "checkpoints" / "ckpt_002"
    changes: dict[str, Any] = {
        "lr": {"kind": "constant", "peak": 1e-30},
        "run__init_from": str(plain["run"]),
        "parallel__pipeline": 2,
    }
    assert (
        pool.run(4, trainer_job, tree(base, "stage2", "data2", batch__micro_sequences=2, **changes))
        == [0] * 4
    )
    run = base / "runs" / "stage2"
    before, first, last = (
        optimizer_of(p)
        for p in (parent, run / "checkpoints" / "ckpt_000", run / "checkpoints" / "ckpt_001")
    )
    assert first == before
    assert {n: v for n, v in last.items() if n.endswith(".master")} == {
        n: v for n, v in before.items() if n.endswith(".master")
    }
    assert last != before, "the moments did not move, so no step was taken"
    assert [manifest_of(p)["adam_steps"] for p in list_checkpoints(run / "checkpoints")] == [10, 15]
    (seam,) = events(run, StageTransition)
    parent_manifest = manifest_of(parent)
    (saved,) = [e for e in events(plain["run"], CheckpointSaved) if e.checkpoint == "ckpt_002"]
    assert seam.parent_manifest_sha256 == saved.manifest_sha256
    assert (seam.parent_step, seam.parent_adam_steps) == (10, 10)
    assert (seam.rate_before, seam.rate_after) == (parent_manifest["lr"], 1e-30)
    assert seam.same_model and seam.same_tokenizer and seam.moments_kept
    assert seam.data_in_common == ()
    assert all(row.lr == 1e-30 for row in read_metrics(run / "metrics.jsonl"))
    assert (
        manifest_of(run / "checkpoints" / "ckpt_001")["parent"]["parent_manifest_sha256"]
        == saved.manifest_sha256
    )


class Planted:
    """Makes one gradient of one rank NaN at some steps, and holds that nothing changes then.

    Picklable.
    """

    def __init__(self, *steps: int):
        self.steps = steps

    def __call__(self, trainer: Trainer) -> None:
        engine = trainer.engine
        reduce, train_step = engine.gradients.reduce, engine.train_step

        def planted() -> torch.Tensor:
            line = reduce()
            if (
                trainer.state.step in self.steps
                and trainer.engine.grid.rank == trainer.engine.grid.layout.world_size - 1
            ):
                line[3] = float("nan")
            return line

        def observed(*arguments: Any) -> Any:
            lines = engine.optimizer.flat_shards
            before = {k: v.clone() for k, v in lines.items()}, engine.optimizer.adam_steps
            result = train_step(*arguments)
            same = all(torch.equal(lines[k], v) for k, v in before[0].items())
            changed = not same or engine.optimizer.adam_steps != before[1]
            assert changed == result.applied == (trainer.state.step not in self.steps), (
                trainer.state.step
            )
            return result

        engine.gradients.reduce = planted  # type: ignore[method-assign]
        engine.train_step = observed  # type: ignore[method-assign]


def test_a_step_that_is_not_finite_changes_nothing(base: Path, pool: GlooPool) -> None:
    """NaN on one rank of two: skipped on both, on record with its rows and tensors, not counted by
    the optimizer.
    """
    assert pool.run(2, trainer_job, tree(base, "skips"), Planted(5, 7, 8)) == [0, 0]
    run = base / "runs" / "skips"
    skipped = events(run, StepSkipped)
    assert [event.step for event in skipped] == [5, 7, 8]
    assert [event.in_a_row for event in skipped] == [1, 1, 2]
    assert (skipped[1].chunk, skipped[1].rows) == ("chunk_001", (12, 24)) and skipped[1].tensors
    rows = latest(run / "metrics.jsonl")
    assert [row.step for row in rows if not row.applied] == [5, 7, 8]
    assert rows[6].grad_norm != rows[6].grad_norm
    first, last = (manifest_of(run / "checkpoints" / name) for name in ("ckpt_001", "ckpt_002"))
    assert (first["step"], first["adam_steps"], first["loss"]) == (5, 4, rows[3].loss)
    assert (last["step"], last["adam_steps"]) == (10, 7)
    for path in list_checkpoints(run / "checkpoints"):
        json.loads(
            (path / "manifest.json").read_text(),
            parse_constant=lambda text: pytest.fail(f"{text} is not JSON"),
        )


def test_three_in_a_row_stop_the_run(base: Path, pool: GlooPool) -> None:
    """Exit code 1 on every rank, the reason in the ledger, and the save that was under way is
    finished.
    """
    assert pool.run(2, trainer_job, tree(base, "stops"), Planted(6, 7, 8)) == [1, 1]
    run = base / "runs" / "stops"
    stopped = events(run, Event)[-1]
    assert isinstance(stopped, Stopped)
    assert (stopped.reason, stopped.step) == ("non-finite", 8)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["ckpt_000", "ckpt_001"]
    verify_checkpoint(run / "checkpoints" / "ckpt_001")


def test_a_restart_does_not_forget_bad_steps(base: Path, pool: GlooPool) -> None:
    """Two before the restart and one after it are three in a row: a crash loop must not train on
    damaged weights.
    """
    settings = tree(base, "remembers", checkpoint__every_chunks=2)
    assert pool.run(
        1,
        trainer_job,
        {**settings, "run": {**settings["run"], "stop_after_steps": 8}},
        Planted(7, 8),
    ) == [75]
    assert pool.run(1, trainer_job, settings, Planted(9)) == [1]
    assert events(base / "runs" / "remembers", Stopped)[-1].step == 9


def test_every_second_chunk(base: Path, pool: GlooPool) -> None:
    """Numbers count chunks, not saves; the last chunk is always saved."""
    make_corpus(base / "five", 5, seed=3)
    assert pool.run(1, trainer_job, tree(base, "every", "five", checkpoint__every_chunks=2)) == [0]
    names = [path.name for path in list_checkpoints(base / "runs" / "every" / "checkpoints")]
    assert names == ["ckpt_000", "ckpt_002", "ckpt_004", "ckpt_005"]


def test_saves_by_the_clock(base: Path, pool: GlooPool) -> None:
    """`every_seconds` saves within a chunk, on all ranks at once, and does not change the run."""
    assert pool.run(2, trainer_job, tree(base, "clock", checkpoint__every_seconds=1e-4)) == [0, 0]
    assert pool.run(2, trainer_job, tree(base, "no-clock")) == [0, 0]
    runs = [base / "runs" / name for name in ("clock", "no-clock")]
    names = [event.checkpoint for event in events(runs[0], CheckpointSaved)]
    assert "ckpt_000_step_000001" in names and any(
        name.startswith("ckpt_001_step_") for name in names
    )
    assert compare_runs.differences(*runs, strict=True) == []


def test_asynchronous_or_not(base: Path, pool: GlooPool, plain: dict[str, Any]) -> None:
    """The same tensors in every checkpoint: the copy that is saved is not touched by the steps that
    go on meanwhile.
    """
    assert pool.run(1, trainer_job, tree(base, "waiting", checkpoint__asynchronous=False)) == [0]
    for path in list_checkpoints(plain["run"] / "checkpoints"):
        other = base / "runs" / "waiting" / "checkpoints" / path.name
        # Not the files: safetensors writes the entries of a header's metadata in any order.
        assert compare_runs.tensor_differences(path, other) == []


def full_disk(trainer: Trainer) -> None:
    """The last rank can no longer write."""
    trainer.checkpoints.writer.wait()
    last = trainer.engine.grid.layout.world_size - 1
    fault_injection.arm(f"save.optimizer@rank={last}:error=ENOSPC", trainer.engine.grid.rank)


@pytest.mark.parametrize("asynchronous", (True, False), ids=("asynchronous", "waiting"))
def test_a_disk_that_refuses(base: Path, pool: GlooPool, asynchronous: bool) -> None:
    """Every rank ends with 1, promptly, the ledger says why, the checkpoint before is whole, and
    the run can continue.
    """
    name = f"full-{asynchronous}"
    changes: dict[str, Any] = {
        "checkpoint__asynchronous": asynchronous,
        "checkpoint__retry_seconds": 0,
    }
    assert pool.run(2, trainer_job, tree(base, name, **changes), full_disk) == [1, 1]
    run = base / "runs" / name
    stopped = events(run, Stopped)[-1]
    assert stopped.reason == "save failed"
    assert "No space left on device" in str(stopped.problem)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["ckpt_000"]
    verify_checkpoint(run / "checkpoints" / "ckpt_000")
    assert pool.run(2, trainer_job, tree(base, name, **changes)) == [0, 0]
    assert not list((run / "checkpoints").glob("*.tmp"))


@dataclass(frozen=True)
class NoRoomForRows:
    """Rank 0 cannot write a row any more from step `first` on; picklable."""

    first: int

    def __call__(self, trainer: Trainer) -> None:
        logger = trainer.logger
        if isinstance(logger, RankZeroRunLogger):
            write = logger.metrics.write

            def refused(record: StepRecord) -> None:
                if record.step >= self.first:
                    raise OSError(28, "No space left on device")
                write(record)

            logger.metrics.write = refused  # type: ignore[method-assign]


def test_metrics_that_cannot_be_written(base: Path, pool: GlooPool) -> None:
    """Every rank ends with 1 at the next step, not rank 0 alone with a traceback.

    The ledger says why in one line.
    """
    assert pool.run(
        2,
        trainer_job,
        tree(base, "no-rows", checkpoint__retry_seconds=0),
        NoRoomForRows(3),
    ) == [1, 1]
    run = base / "runs" / "no-rows"
    stopped = events(run, Event)[-1]
    assert isinstance(stopped, Stopped) and stopped.problem is not None
    assert (stopped.reason, stopped.step) == ("save failed", 4)
    assert "metrics.jsonl cannot be written: No space left on device" in stopped.problem
    assert "\n" not in stopped.problem
    assert [row.step for row in read_metrics(run / "metrics.jsonl")] == [1, 2]


def test_the_last_row_that_cannot_be_written(base: Path, pool: GlooPool) -> None:
    """Of a run of 10 steps: no step follows that would tell the others: the checkpoint of the step
    does, and the run is not called finished.
    """
    assert pool.run(
        2,
        trainer_job,
        tree(base, "no-last", checkpoint__retry_seconds=0),
        NoRoomForRows(10),
    ) == [1, 1]
    run = base / "runs" / "no-last"
    assert [type(event) for event in events(run, Event)][-2:] == [CheckpointSaved, Stopped]
    verify_checkpoint(run / "checkpoints" / "ckpt_002")


class Raises:
    """Rank 0 raises at the end of the next save, in `committed` or where older checkpoints are
    thinned.

    Picklable.
    """

    def __init__(self, where: str, error: Exception):
        self.where, self.error = where, error

    def __call__(self, trainer: Trainer) -> None:
        trainer.checkpoints.writer.wait()

        def refused(*_: Any) -> None:
            raise self.error

        if trainer.engine.grid.rank == 0:
            setattr(
                trainer.logger if self.where == "committed" else trainer.checkpoints.writer,
                self.where,
                refused,
            )


@pytest.mark.parametrize(
    ("where", "error", "code", "words"),
    (
        ("committed", RunError("planted"), "RunError: planted", ""),
        ("committed", KeyError("planted"), 1, "KeyError('planted')"),
        ("_retire", PermissionError(13, "Permission denied"), 0, ""),
    ),
    ids=("user", "bug", "thinning"),
)
def test_an_error_at_the_end_of_a_save(
    base: Path, pool: GlooPool, where: str, error: Exception, code: int | str, words: str
) -> None:
    """It is the same error on every rank: rank 0 alone would leave the others in the exchange that
    ends a save.
    """
    name = f"raises-{where}-{type(error).__name__}"
    assert pool.run(2, trainer_job, tree(base, name), Raises(where, error)) == [
        code,
        code,
    ]
    run = base / "runs" / name
    verify_checkpoint(run / "checkpoints" / "ckpt_001")
    if words:
        assert words in str(events(run, Stopped)[-1].problem)
    saved = [event.checkpoint for event in events(run, CheckpointSaved)]
    # Thinning is no reason to end a run that saves: it is reported and retried after the next
    # save.
    assert saved == (["ckpt_000", "ckpt_001", "ckpt_002"] if where == "_retire" else ["ckpt_000"])


def damaged_held_out(trainer: Trainer) -> None:
    """After the checks of the start."""
    if trainer.engine.grid.rank == 0:
        file = trainer.start.manifest.folder / "held_out.npy"
        content = bytearray(file.read_bytes())
        content[-7] ^= 1
        file.write_bytes(bytes(content))


def test_a_held_out_chunk_damaged_in_the_middle_of_a_run(tmp_path: Path, pool: GlooPool) -> None:
    """All ranks stop with the same line, and the chunk just trained is saved, without a held-out
    loss.
    """
    make_corpus(tmp_path / "data", 2)
    settings = config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "score")
    assert pool.run(
        2, trainer_job, {**settings, "run": {**settings["run"], "stop_after_steps": 3}}
    ) == [75, 75]
    errors = pool.run(2, trainer_job, settings, damaged_held_out)
    assert (
        errors[0] == errors[1]
        and errors[0].startswith("DamagedChunkError: ")
        and "held_out" in errors[0]
    )
    saved = tmp_path / "runs" / "score" / "checkpoints" / "ckpt_001"
    manifest = verify_checkpoint(saved)
    assert (manifest.step, manifest.held_out_loss) == (5, None)
    *_, last, read_back, ended = events(tmp_path / "runs" / "score", Event)
    assert isinstance(last, CheckpointSaved) and last.checkpoint == "ckpt_001"
    assert isinstance(read_back, CheckpointVerified)
    assert isinstance(ended, Stopped) and ended.reason == "refused"


def damaged_when_half_read(trainer: Trainer) -> None:
    """The held-out chunk was whole when it was opened."""
    (loader,) = trainer.batches.held_out
    read = loader.read

    def damaged(index: int) -> Any:
        if index == 1:
            raise DataError("held_out: row 13 is not what was prepared")
        return read(index)

    loader.read = damaged  # type: ignore[method-assign]


def test_damage_found_while_one_process_reads_saves_first(base: Path, pool: GlooPool) -> None:
    """Catches a run that trains its last chunk again at every start, and fails there again."""
    settings = tree(base, "half-read")
    (text,) = pool.run(1, trainer_job, settings, damaged_when_half_read)
    assert text == "DamagedChunkError: held_out: row 13 is not what was prepared"
    manifest = verify_checkpoint(base / "runs" / "half-read" / "checkpoints" / "ckpt_001")
    assert (manifest.step, manifest.held_out_loss) == (5, None)


def test_a_chunk_damaged_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """Found before its first row is used: all ranks stop, one line, exit code 2, and the chunk
    before is saved.
    """
    make_corpus(tmp_path / "data", 4)
    path = write_yaml(
        tmp_path / "c.yaml",
        config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "hurt"),
    )
    # Held at its second step, so that the chunk is damaged before a busy machine comes to it.
    held = {"K2TRAIN_FAULTS": "step.done@step=2:sleep=5"}
    changes = ("batch.micro_sequences=6", "run.allow=[faults]")
    process = start(path, *changes, processes=2, **held)
    try:
        wait_for(tmp_path / "runs" / "hurt" / "checkpoints" / "ckpt_000", process)
        chunk = tmp_path / "data" / "chunk_003.npy"
        content = bytearray(chunk.read_bytes())
        content[-7] ^= 1
        chunk.write_bytes(bytes(content))
        output, _ = process.communicate()
    finally:
        kill_all(process)
    messages = [line for line in output.splitlines() if line.startswith("k2train:")]
    assert len(messages) == 1 and "chunk_003" in messages[0] and "sha256" in messages[0], output
    assert process.job.codes[0] == 2, output
    assert "trainer.py" not in output, "a traceback"
    newest = list_checkpoints(tmp_path / "runs" / "hurt" / "checkpoints")[-1]
    assert newest.name == "ckpt_003"
    verify_checkpoint(newest)


KILLED = "forcefully exiting via"
"""What torchrun says of a process that did not end within its patience."""


def test_a_held_directory_ends_all_ranks_at_once(tmp_path: Path) -> None:
    """Rank 0 is refused while the others already wait for it.

    They must not wait for the launcher's 30 s patience.
    """
    make_corpus(tmp_path / "data", 1)
    path = write_yaml(
        tmp_path / "c.yaml",
        config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "held"),
    )
    with RunLock(tmp_path / "runs" / "held"):
        done = cold_train(path, processes=2)
    messages = [line for line in done.stderr.splitlines() if line.startswith("k2train:")]
    assert len(messages) == 1 and "held by a live run" in messages[0]
    assert KILLED not in done.stderr


FAULTY = """
import sys
sys.path.insert(0, {root!r})
from k2train.train.engine import Engine
from k2train.train.__main__ import main
import os
step = Engine.train_step
calls = []
def faulty(self, *arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 7:
        raise RuntimeError("planted")
    return step(self, *arguments)
Engine.train_step = faulty
sys.exit(main())
"""


def test_one_rank_that_raises_ends_all(tmp_path: Path) -> None:
    """A bug on one rank must not leave the others in a barrier: the launcher does not come to the
    end of its patience, no process is left, and what was saved is whole.
    """
    import subprocess

    make_corpus(tmp_path / "data", 2)
    path = write_yaml(
        tmp_path / "c.yaml",
        config_tree(tmp_path / "data" / "manifest.json", tmp_path / "runs", "bug"),
    )
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(root=str(ROOT)))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launcher, str(script), str(path), "batch.micro_sequences=6"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env=environment(),
    )
    assert done.returncode == 1 and "RuntimeError: planted" in done.stderr, done.stderr
    assert KILLED not in done.stderr
    assert len(read_metrics(tmp_path / "runs" / "bug" / "metrics.jsonl")) == 6
    for checkpoint in list_checkpoints(tmp_path / "runs" / "bug" / "checkpoints"):
        verify_checkpoint(checkpoint)
    done = train(path)
    assert done.returncode == 0, done.stderr
