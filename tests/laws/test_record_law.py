"""The second law: a run stopped anywhere and started again continues bit for bit.

Through the real command line, with kill -9, signals and planned stops, on one process and under
torchrun. Each test would catch a restart that reads other rows, takes another learning rate, or
loses a bit of weights, master weights or moments.
"""

import hashlib
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_runs
import pytest

from k2train.checkpoint.manifest import list_checkpoints
from k2train.checkpoint.verify import verify_checkpoint
from k2train.record.events import CheckpointSaved, ChunkDeferred, Resumed, Stopped, of_kind
from k2train.record.ledger import Ledger, read_ledger
from k2train.record.ledger_head import write_head
from k2train.record.metrics import latest, read_metrics
from k2train.train.trainer import Trainer
from tests.support.command_line import HANG_SECONDS, load_tool
from tests.support.data_folder import flip
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_corpus import (
    STEPS_PER_CHUNK,
    config_tree,
    kill_all,
    make_corpus,
    manifest_of,
    nothing,
    start,
    train,
    trainer_job,
    wait_for,
    write_yaml,
)

CHUNKS = 4
STEPS = CHUNKS * STEPS_PER_CHUNK


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, and the runs of this file in `runs`."""
    folder = tmp_path_factory.mktemp("resume")
    make_corpus(folder / "data", CHUNKS)
    return folder


def config(base: Path, name: str, **changes: Any) -> Path:
    tree = config_tree(base / "data" / "manifest.json", base / "runs", name, **changes)
    return write_yaml(base / f"{name}.yaml", tree)


@pytest.fixture(scope="module")
def straight(base: Path) -> Path:
    """20 steps without a stop."""
    done = train(config(base, "straight"))
    assert done.returncode == 0, done.stderr
    return base / "runs" / "straight"


def assert_same_run(run: Path, straight: Path) -> None:
    """Every loss, norm, rate and chunk of the last attempts, and every tensor of the last
    checkpoint.
    """
    assert compare_runs.differences(straight, run, strict=True) == []
    rows = latest(run / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, rows[-1].step + 1))
    assert [row.chunk for row in rows] == [
        f"chunk_{(row.step - 1) // STEPS_PER_CHUNK:03d}" for row in rows
    ]
    samples = [
        [(row.chunk, row.rows) for row in latest(r / "metrics.jsonl")] for r in (run, straight)
    ]
    assert samples[0] == samples[1]
    for checkpoint in list_checkpoints(run / "checkpoints"):
        verify_checkpoint(checkpoint)
    read_ledger(run / "ledger.jsonl")


def wait_for_row(run: Path, attempt: int, process: Any) -> None:
    """Until the run has finished a step of `attempt`."""
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        if (run / "metrics.jsonl").exists() and any(
            r.attempt == attempt for r in read_metrics(run / "metrics.jsonl")
        ):
            return
        assert process.poll() is None and time.monotonic() < deadline, "ended before its first step"
        time.sleep(0.002)


def kill_after(
    base: Path, path: Path, name: str, checkpoint: str, chunks: int = CHUNKS, processes: int = 1
) -> Path:
    """Start, kill -9 at a random moment after `checkpoint` is there.

    The run must not have been finished.
    """
    run = base / "runs" / name
    # Held before its end, which it could else come to while a busy machine lets this process wait.
    last = chunks * STEPS_PER_CHUNK
    held = {"K2TRAIN_FAULTS": f"step.done@step={last}:sleep=600"}
    process = start(path, "run.allow=[faults]", processes=processes, **held)
    try:
        wait_for(run / "checkpoints" / checkpoint, process)
        time.sleep(random.uniform(0, 0.05))
    finally:
        code = kill_all(process)
    assert code == -signal.SIGKILL
    assert not (run / "checkpoints" / f"ckpt_{chunks:03d}").exists(), (
        "killed too late to show anything"
    )
    return run


def test_kill_9_and_go_on(base: Path, straight: Path) -> None:
    """The law itself: 20 steps equal some, kill -9, the rest."""
    path = config(base, "killed")
    run = kill_after(base, path, "killed", "ckpt_001")
    done = train(path)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert_same_run(run, straight)
    assert {row.attempt for row in read_metrics(run / "metrics.jsonl")} == {1, 2}


def test_stops_on_request(base: Path, straight: Path) -> None:
    """Exit 75, a checkpoint named after the step it was saved at, and not a bit lost.

    Three ways in a row.
    """
    path = config(base, "stopped", run__allow=["faults"])
    run = base / "runs" / "stopped"
    done = train(path, "run.stop_after_steps=7")
    assert done.returncode == 75, done.stderr
    assert (run / "checkpoints" / "ckpt_001_step_000007").is_dir()
    asked = []
    for attempt, number in ((2, signal.SIGTERM), (3, signal.SIGINT)):
        # Not so quick that a busy machine asks it when it is done.
        process = start(path, K2TRAIN_FAULTS="step.done@nth=2:sleep=1")
        wait_for_row(run, attempt, process)
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.returncode == 75, output
        stopped = read_ledger(run / "ledger.jsonl")[-1].event
        assert isinstance(stopped, Stopped) and stopped.reason == number.name
        newest = list_checkpoints(run / "checkpoints")[-1]
        step = manifest_of(newest)["step"]
        whole, rest = divmod(step, STEPS_PER_CHUNK)
        assert newest.name == (f"ckpt_{whole:03d}_step_{step:06d}" if rest else f"ckpt_{whole:03d}")
        asked.append(newest.name)
        assert stopped.step == step
        assert "Traceback" not in output
        logged = "config changes since that checkpoint: run.stop_after_steps: 7 -> null" in output
        assert logged == (attempt == 2), "a change is logged once, and only where there is one"
    done = train(path, "checkpoint.keep_optimizer_states=7")
    assert done.returncode == 0, done.stderr
    assert (
        "config changes since that checkpoint: checkpoint.keep_optimizer_states"
        in done.stdout + done.stderr
    )
    assert_same_run(run, straight)
    numbered = [f"ckpt_{n:03d}" for n in range(CHUNKS + 1)]
    found = [path.name for path in list_checkpoints(run / "checkpoints")]
    # That of SIGTERM goes once two newer ones are verified: how many there are is a matter of time.
    by_system, by_person = asked
    stay = {*numbered, by_person}
    assert set(found) - {by_system} == stay - {by_system}, (
        "Ctrl-C's save stays, a step limit's goes"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "layout"),
    ((2, {}), (4, {"parallel__tensor": 2, "parallel__pipeline": 2})),
    ids=("dp2", "tp2-pp2"),
)
def test_torchrun_kill_9_and_go_on(base: Path, processes: int, layout: dict[str, int]) -> None:
    """The same with several processes: one run straight, one killed in all
    its processes at once.
    """
    few = {
        "data__order": [0, 1],
        "batch__micro_sequences": 6,
        "data__held_out_batches": 1,
        **layout,
    }
    names = [f"{kind}-{processes}" for kind in ("straight", "killed")]
    paths = [config(base, name, **few) for name in names]
    done = train(paths[0], processes=processes)
    assert done.returncode == 0, done.stderr
    run = kill_after(base, paths[1], names[1], "ckpt_001", 2, processes)
    done = train(paths[1], processes=processes)
    assert done.returncode == 0, done.stderr
    assert_same_run(run, base / "runs" / names[0])
    assert list_checkpoints(run / "checkpoints")[-1].name == "ckpt_002"


def test_planned_stop_at_a_chunk_end(base: Path, pool: GlooPool) -> None:
    """A stop that falls on a chunk's end is the numbered checkpoint itself, also where every_chunks
    would pass it over.
    """
    tree = config_tree(
        base / "data" / "manifest.json", base / "runs", "chunk-end", checkpoint__every_chunks=3
    )
    run = base / "runs" / "chunk-end"
    tree["run"]["stop_after_steps"] = 2 * STEPS_PER_CHUNK
    assert pool.run(1, trainer_job, tree) == [75]
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["ckpt_000", "ckpt_002"]


def rounded_master(trainer: Trainer) -> None:
    optimizer = trainer.engine.optimizer
    optimizer.master.copy_(optimizer.master.bfloat16().float())
    optimizer.write_parameters()


def no_first_moment(trainer: Trainer) -> None:
    trainer.engine.optimizer.exp_avg.zero_()


def no_second_moment(trainer: Trainer) -> None:
    trainer.engine.optimizer.exp_avg_sq.zero_()


def no_adam_steps(trainer: Trainer) -> None:
    trainer.engine.optimizer.adam_steps = 0


def no_step(trainer: Trainer) -> None:
    trainer.state.step, trainer.first_step = 0, 1
    shutil.rmtree(trainer.start.checkpoints / "ckpt_001")
    shutil.rmtree(trainer.start.checkpoints / "ckpt_002")


@pytest.fixture(scope="module")
def straight_bf16(base: Path, pool: GlooPool) -> Path:
    """20 steps with bf16 weights, where the fp32 masters hold bits that the weights do not."""
    tree = config_tree(
        base / "data" / "manifest.json", base / "runs", "straight-bf16", precision="bf16"
    )
    assert pool.run(1, trainer_job, tree) == [0]
    return base / "runs" / "straight-bf16"


def copied(
    base: Path, source: Path, name: str, *without: str, **changes: Any
) -> tuple[Path, dict[str, Any]]:
    """A copy of the finished bf16 run without some of its checkpoints, and the config that goes on
    with it.
    """
    run = base / "runs" / name
    shutil.copytree(source, run)
    for checkpoint in without:
        shutil.rmtree(run / "checkpoints" / checkpoint)
    return run, config_tree(
        base / "data" / "manifest.json", base / "runs", name, precision="bf16", **changes
    )


def resumed_from(run: Path) -> list[str]:
    return [event.checkpoint for event in of_kind(read_ledger(run / "ledger.jsonl"), Resumed)]


def test_finished_means_whole(base: Path, pool: GlooPool, straight_bf16: Path) -> None:
    """A damaged last checkpoint is no result: its chunk is trained again from the one before, to
    the same bits.
    """
    run, tree = copied(base, straight_bf16, "damaged-end")
    assert pool.run(2, trainer_job, tree) == ["finished: ckpt_004"] * 2
    assert read_ledger(run / "ledger.jsonl") == read_ledger(straight_bf16 / "ledger.jsonl")
    file = next((run / "checkpoints" / "ckpt_004" / "optimizer").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert pool.run(1, trainer_job, tree) == [0]
    assert resumed_from(run) == ["ckpt_003"]
    assert_same_run(run, straight_bf16)
    assert pool.run(1, trainer_job, tree) == ["finished: ckpt_004"]


def test_the_newest_that_verifies_however_far_back(
    base: Path, pool: GlooPool, straight_bf16: Path
) -> None:
    """Catches a limit on the checkpoints tried, and a message about some that nobody looked at."""
    run, tree = copied(base, straight_bf16, "far-back")
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert len(names) == 5
    for name in names[1:]:
        flip(next((run / "checkpoints" / name / "optimizer").glob("*.safetensors")))
    assert pool.run(1, trainer_job, tree) == [0]
    assert resumed_from(run) == ["ckpt_000"]
    (event,) = of_kind(read_ledger(run / "ledger.jsonl"), Resumed)
    assert [text.split(": ")[1].split("/")[-1] for text in event.refused] == names[:0:-1]
    assert_same_run(run, straight_bf16)

    for name in names:
        flip(next((run / "checkpoints" / name / "optimizer").glob("*.safetensors")))
    (refused,) = pool.run(1, trainer_job, tree)
    assert "none of the 5 checkpoints with optimizer states in" in refused
    assert refused.count("does not match its hash") == 3 and "; and 2 more; " in refused
    tree["run"]["resume"] = 3
    (refused,) = pool.run(1, trainer_job, tree)
    assert "ckpt_003 (run.resume) is not whole: " in refused and "none of" not in refused


def test_going_back_by_number_goes_back_once(
    base: Path, pool: GlooPool, straight_bf16: Path
) -> None:
    """Queued again with the same command it must continue: a job that went back at every start
    would never end.
    """
    run, tree = copied(base, straight_bf16, "back", run__resume=1, run__stop_after_steps=3)
    assert pool.run(1, trainer_job, tree) == [75]
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["ckpt_000", "ckpt_001", "ckpt_001_step_000008"]
    aside = run / "checkpoints" / "set_aside_by_attempt_2"
    assert sorted(path.name for path in aside.iterdir()) == ["ckpt_002", "ckpt_003", "ckpt_004"]
    verify_checkpoint(aside / "ckpt_004")
    assert pool.run(1, trainer_job, tree) == [75]
    assert resumed_from(run) == ["ckpt_001", "ckpt_001_step_000008"]
    del tree["run"]["stop_after_steps"]
    assert pool.run(1, trainer_job, tree) == [0]
    assert resumed_from(run)[-1] == "ckpt_002_step_000011"
    assert_same_run(run, straight_bf16)


def test_a_deferral_in_the_ledger_moves_the_chunk(
    base: Path, pool: GlooPool, straight_bf16: Path
) -> None:
    """Catches a trainer and an inspection that disagree on the order, and a deferral that changes
    more than the order: the run is that of a config with the order written out.
    """
    later = ["ckpt_002", "ckpt_003", "ckpt_004"]
    run, tree = copied(base, straight_bf16, "deferred", *later)
    Ledger(run / "ledger.jsonl").append(
        ChunkDeferred(attempt=1, chunk="chunk_001", step=STEPS_PER_CHUNK, order_index=3)
    )
    # The checkpoint is of the order before; the ledger itself says that this one follows it.
    assert pool.run(1, trainer_job, tree) == [0]
    assert pool.run(1, trainer_job, tree) == ["finished: ckpt_004"]

    ordered = config_tree(
        base / "data" / "manifest.json",
        base / "runs",
        "ordered",
        precision="bf16",
        data__order=[0, 2, 3, 1],
    )
    assert pool.run(1, trainer_job, ordered) == [0]
    assert compare_runs.differences(base / "runs" / "ordered", run, strict=True) == []

    inspected = load_tool("inspect_data").open_run(run)
    assert list(dict.fromkeys(row.chunk for row in latest(run / "metrics.jsonl"))) == list(
        inspected.order.names
    )


def test_a_checkpoint_that_the_ledger_missed(
    base: Path, pool: GlooPool, straight_bf16: Path
) -> None:
    """Killed between the rename and the ledger's line: recorded at the next start, once, with the
    hash of its manifest.
    """
    run, tree = copied(
        base, straight_bf16, "untold", "ckpt_003", "ckpt_004", run__stop_after_steps=1
    )
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    at = next(
        entry.seq
        for entry in read_ledger(run / "ledger.jsonl")
        if isinstance(entry.event, CheckpointSaved) and entry.event.checkpoint == "ckpt_002"
    )
    (run / "ledger.jsonl").write_text("".join(lines[:at]))
    write_head(run / "ledger.jsonl", Ledger(run / "ledger.jsonl").head)
    for _ in range(2):
        assert pool.run(1, trainer_job, tree) == [75]
    saved = of_kind(read_ledger(run / "ledger.jsonl"), CheckpointSaved)
    recovered = [event for event in saved if event.recovered]
    assert [event.checkpoint for event in recovered] == ["ckpt_002"]
    content = (run / "checkpoints" / "ckpt_002" / "manifest.json").read_bytes()
    assert recovered[0].manifest_sha256 == hashlib.sha256(content).hexdigest()
    assert len({event.checkpoint for event in saved}) == len(saved)


@pytest.mark.parametrize(
    "forget", (nothing, rounded_master, no_first_moment, no_second_moment, no_adam_steps, no_step)
)
def test_every_item_of_state_matters(
    base: Path, pool: GlooPool, straight_bf16: Path, forget: Callable[[Trainer], None]
) -> None:
    """Resume with one item left out and the comparison fails; with none left out it does not."""
    name = f"forgets-{forget.__name__}"
    run = base / "runs" / name
    shutil.copytree(straight_bf16, run)
    for later in ("ckpt_003", "ckpt_004"):
        shutil.rmtree(run / "checkpoints" / later)
    # The run itself would stop at the second step.
    tree = config_tree(
        base / "data" / "manifest.json",
        base / "runs",
        name,
        precision="bf16",
        audit__resume_drill="off",
    )
    assert pool.run(1, trainer_job, tree, forget) == [0]
    found = compare_runs.differences(straight_bf16, run, strict=True)
    if forget is nothing:
        assert found == []
    else:
        assert any("is the first that differs" in line for line in found), found
        assert any("values differ" in line for line in found), found
