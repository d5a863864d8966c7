"""Checkpoints: layout-free reads, named damage, and commits that survive a kill.

Any grid reads any grid's checkpoint, and a kill never leaves half a one to be loaded.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2train import fault_injection
from k2train.checkpoint.load import agree_on_checkpoint, load_states
from k2train.checkpoint.manifest import (
    MANIFEST,
    THINNED,
    list_checkpoints,
    mark_thinned,
    read_manifest,
    seal,
)
from k2train.checkpoint.save_events import SavePolicy
from k2train.checkpoint.verify import verify_checkpoint
from k2train.checkpoint.writer import CheckpointWriter, SaveError, snapshot
from k2train.errors import CheckpointError
from k2train.launch.environment import Launch
from k2train.train.engine import Engine
from tests.support.gloo_pool import GlooPool
from tests.support.lanes import lanes
from tests.support.tiny_corpus import (
    ROOT,
    config_tree,
    environment,
    make_corpus,
    manifest_of,
    trainer_job,
    tree_of,
)
from tests.support.tiny_model import (
    assemble,
    engine_of,
    grid_of,
    local_gradients,
    microbatches_of,
    save_facts,
    shapes_of,
    tiny_config,
)

sys.path.insert(0, str(ROOT / "tools"))
import compare_runs
import verify_checkpoint as verify_tool

# (tensor, pipeline, data, stages_per_rank)
GRIDS = (
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 1, 3, 1),
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (1, 2, 2, 2),
    (2, 2, 2, 1),
)


def config_on(tensor: int, pipeline: int, stages_per_rank: int) -> Any:
    """Config of 24 sequences on a grid.

    Vocabulary 251 is odd, and blocks of 48 and 63 rows are not whole multiples of 3 or 2.
    """
    return tiny_config(
        parallel__tensor=tensor,
        parallel__pipeline=pipeline,
        parallel__sequence=tensor > 1,
        parallel__stages_per_rank=stages_per_rank,
        parallel__schedule="interleaved" if stages_per_rank > 1 else "1f1b",
    )


def values_of(engine: Engine) -> dict[str, Any]:
    return {
        state: local_gradients(engine, line) for state, line in engine.optimizer.flat_shards.items()
    }


def save_job(
    launch: Launch, config: Any, directory: str, asynchronous: bool = False
) -> dict[str, Any]:
    """Train two steps, save, train one more.

    Returns the blocks as saved, and the loss and norm of the third step.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    for step in (1, 2):
        engine.train_step(microbatches_of(config, grid, step), 1e-2)
    saved = values_of(engine)
    writer = CheckpointWriter(Path(directory), grid, SavePolicy(asynchronous=asynchronous))
    state = snapshot(engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype)
    facts = save_facts(2, engine.optimizer.adam_steps)
    writer.save("ckpt_001", state, facts)
    result = engine.train_step(microbatches_of(config, grid, 3), 1e-2)
    writer.wait()
    return {"saved": saved, "next": (result.loss, result.grad_norm)}


def load_job(launch: Launch, config: Any, path: str) -> dict[str, Any]:
    """Load, then one step."""
    grid = grid_of(launch, config)
    chosen, refused = agree_on_checkpoint([Path(path)], grid)
    assert chosen is not None, refused
    engine = engine_of(config, grid, fill=False)
    kept = load_states(
        chosen, engine.gradients.shard_layout, engine.optimizer.flat_shards, grid, engine.dtype
    )
    engine.optimizer.adam_steps = read_manifest(chosen).adam_steps
    engine.optimizer.write_parameters()
    loaded = values_of(engine)
    result = engine.train_step(microbatches_of(config, grid, 3), 1e-2)
    return {"loaded": loaded, "next": (result.loss, result.grad_norm), "kept": kept}


def whole(parts: list[dict[str, Any]], key: str, config: Any) -> dict[str, np.ndarray]:
    shapes = shapes_of(config)
    return {
        f"{name}.{state}": values
        for state in ("master", "exp_avg", "exp_avg_sq")
        for name, values in assemble([part[key][state] for part in parts], shapes).items()
    }


class Saved:
    """A checkpoint on one grid with what was in it."""

    def __init__(self, pool: GlooPool, directory: Path, grid: tuple[int, int, int, int]):
        tensor, pipeline, data, stages = grid
        self.config = config_on(tensor, pipeline, stages)
        parts = pool.run(tensor * pipeline * data, save_job, self.config, str(directory))
        self.path = directory / "ckpt_001"
        self.values, self.next = whole(parts, "saved", self.config), parts[0]["next"]


@pytest.fixture(scope="module")
def saved(
    pool: GlooPool, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, int, int, int], Saved]:
    return {grid: Saved(pool, tmp_path_factory.mktemp("grid"), grid) for grid in GRIDS}


@pytest.mark.parametrize(
    *lanes("target", GRIDS, lambda grid: grid in ((1, 1, 1, 1), (2, 2, 2, 1))), ids=str
)
def test_every_grid_loads_every_grids_checkpoint(
    pool: GlooPool, saved: dict[Any, Saved], target: Any
) -> None:
    """Catches a wrong offset, padding that is saved, and a moment that is left behind.

    Weights and moments agree to the bit, the next loss within 1e-6. Vocabulary 251 and blocks that
    data parallelism does not divide are part of it.
    """
    tensor, pipeline, data, stages = target
    config = config_on(tensor, pipeline, stages)
    for source, checkpoint in saved.items():
        parts = pool.run(tensor * pipeline * data, load_job, config, str(checkpoint.path))
        loaded = whole(parts, "loaded", config)
        for name, values in checkpoint.values.items():
            assert values.tobytes() == loaded[name].tobytes(), f"{source} -> {target}: {name}"
        assert np.any(loaded["head.weight.exp_avg"]), "moments are zero, so they show nothing"
        assert parts[0]["next"][0] == pytest.approx(checkpoint.next[0], rel=1e-6), (source, target)


def test_forty_lines_rebuild_a_checkpoint(saved: dict[Any, Saved]) -> None:
    """Catches files that differ from the documented format: the reader of docs/checkpoints.md runs.

    It uses json and NumPy only, as somebody without this project would.
    """
    page = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    reader = page.split("```python\n")[1].split("```")[0]
    assert len(reader.splitlines()) <= 40
    documented: dict[str, Any] = {"__name__": "read_checkpoint"}
    exec(compile(reader, "read_checkpoint.py", "exec"), documented)
    for grid in ((2, 2, 2, 1), (1, 1, 3, 1)):
        checkpoint = saved[grid]
        rebuilt = documented["read"](checkpoint.path) | documented["read"](
            checkpoint.path, "optimizer"
        )
        for name, values in checkpoint.values.items():
            assert rebuilt[name].tobytes() == values.tobytes(), (grid, name)
            if name.endswith(".master"):
                weights = rebuilt[name.removesuffix(".master")]
                assert weights.tobytes() == values.tobytes(), (grid, name)
        assert not any(np.isnan(values).any() for values in rebuilt.values())


def test_the_comparing_tool_reads_the_same(saved: dict[Any, Saved]) -> None:
    """Catches tools/compare_runs.py joining shards wrongly.

    Checkpoints of one state from two grids must be the same tensors.
    """
    first, other = saved[(1, 1, 1, 1)], saved[(1, 2, 1, 1)]
    for checkpoint in (first, other):
        tensors = compare_runs.tensors_of(checkpoint.path, "optimizer")
        assert all(
            tensors[name].tobytes() == values.tobytes()
            for name, values in checkpoint.values.items()
        )
    assert compare_runs.tensor_differences(first.path, other.path) == [], "pipelines are bit-equal"
    found = compare_runs.tensor_differences(first.path, saved[(2, 1, 1, 1)].path)
    assert found and all("values differ" in line for line in found), (
        "tensor parallelism differs by rounding"
    )


def test_thinned_loads_weights_only(
    pool: GlooPool, saved: dict[Any, Saved], tmp_path: Path
) -> None:
    """Without its optimizer files a checkpoint still gives its weights.

    The moments start at zero, and the result says so.
    """
    source = saved[(2, 1, 2, 1)]
    shutil.copytree(source.path, tmp_path / "ckpt_001")
    mark_thinned(tmp_path / "ckpt_001", read_manifest(source.path))
    shutil.rmtree(tmp_path / "ckpt_001" / "optimizer")
    verify_checkpoint(tmp_path / "ckpt_001")
    config = config_on(1, 2, 1)
    parts = pool.run(2, load_job, config, str(tmp_path / "ckpt_001"))
    assert not any(part["kept"] for part in parts)
    loaded = whole(parts, "loaded", config)
    for name, values in source.values.items():
        assert np.array_equal(
            loaded[name], values if name.endswith("master") else np.zeros_like(values)
        ), name


def shard(path: Path, folder: str) -> Path:
    return sorted((path / folder).iterdir())[0]


def flip(file: Path, index: int) -> None:
    content = bytearray(file.read_bytes())
    content[index] ^= 1
    file.write_bytes(bytes(content))


def swap(path: Path) -> None:
    a, b = sorted((path / "optimizer").iterdir())[:2]
    other = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(other)


def older_manifest(path: Path) -> None:
    manifest = {**manifest_of(path), "name": "ckpt_000"}
    (path / MANIFEST).write_text(json.dumps(seal(manifest)))


def changed_step(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"step": 2', '"step": 3'))


def stray(path: Path) -> None:
    shutil.copy(
        shard(path, "model"), path / "model" / "shard-99999-model-00001-of-00001.safetensors"
    )


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weight flipped": (lambda p: flip(shard(p, "model"), -5), "model/shard-"),
    "weight header flipped": (lambda p: flip(shard(p, "model"), 20), "model/shard-"),
    "moment flipped": (lambda p: flip(shard(p, "optimizer"), -5), "optimizer/shard-"),
    "weight cut by a byte": (
        lambda p: os.truncate(shard(p, "model"), shard(p, "model").stat().st_size - 1),
        "bytes",
    ),
    "moment empty": (lambda p: os.truncate(shard(p, "optimizer"), 0), "has 0 bytes"),
    "shard missing": (lambda p: shard(p, "optimizer").unlink(), "is missing"),
    "folder missing": (lambda p: shutil.rmtree(p / "model"), "is missing"),
    "shards swapped": (swap, "optimizer/shard-"),
    "shard too many": (stray, "is not in the manifest"),
    "manifest missing": (lambda p: (p / MANIFEST).unlink(), "cannot be read"),
    "manifest cut": (lambda p: os.truncate(p / MANIFEST, 700), "not valid JSON"),
    "manifest empty": (lambda p: os.truncate(p / MANIFEST, 0), "not valid JSON"),
    "step changed": (changed_step, "does not match its own hash"),
    "manifest of another": (older_manifest, "belongs to ckpt_000"),
    "manifest not an object": (lambda p: (p / MANIFEST).write_text("[]"), "not a JSON object"),
}


def test_no_bit_of_a_manifest_can_flip_unseen(saved: dict[Any, Saved], tmp_path: Path) -> None:
    """Catches a changed digit: it is valid JSON and would silently move the run to another step."""
    path = tmp_path / "ckpt_001"
    path.mkdir()
    content = (saved[(1, 1, 1, 1)].path / MANIFEST).read_bytes()
    rng = random.Random(3)
    for index in rng.sample(range(len(content)), 300):
        flipped = bytearray(content)
        flipped[index] ^= 1 << rng.randrange(8)
        (path / MANIFEST).write_bytes(bytes(flipped))
        with pytest.raises(CheckpointError):
            read_manifest(path)
    (path / MANIFEST).write_bytes(content)
    assert read_manifest(path).step == 2


def agree_job(launch: Launch, config: Any, paths: list[str]) -> tuple[str | None, list[str]]:
    chosen, refused = agree_on_checkpoint([Path(p) for p in paths], grid_of(launch, config))
    return (None if chosen is None else chosen.name), refused


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_refused(
    pool: GlooPool,
    saved: dict[Any, Saved],
    tmp_path: Path,
    what: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every rank refuses alike before a value is changed, and takes the checkpoint before.

    The tool reports the same.
    """
    damage, words = DAMAGE[what]
    good, bad = tmp_path / "good" / "ckpt_001", tmp_path / "bad" / "ckpt_001"
    for path in (good, bad):
        shutil.copytree(saved[(2, 1, 2, 1)].path, path)
    assert verify_tool.main([str(good)]) == 0
    damage(bad)
    with pytest.raises(CheckpointError, match=words):
        verify_checkpoint(bad)
    answers = pool.run(2, agree_job, config_on(1, 1, 1), [str(bad), str(good)])
    for chosen, refused in answers:
        assert chosen == "ckpt_001"
        assert len(refused) == 1 and words in refused[0] and str(bad) in refused[0]
    capsys.readouterr()
    if (bad / MANIFEST).exists():
        assert verify_tool.main([str(bad), str(good)]) == 2
        reported = capsys.readouterr()
        assert (
            words in reported.err
            and len(reported.err.splitlines()) == 1
            and f"{good}: whole" in reported.out
        )


def test_half_written_is_never_taken(saved: dict[Any, Saved], tmp_path: Path) -> None:
    """Even a whole one, while it still has the name it is written under."""
    shutil.copytree(saved[(1, 1, 1, 1)].path, tmp_path / "ckpt_001")
    shutil.copytree(saved[(1, 1, 1, 1)].path, tmp_path / "ckpt_002.tmp")
    (tmp_path / "ckpt_003").write_text("not a directory")
    (tmp_path / "set_aside_by_attempt_2" / "ckpt_004").mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["ckpt_001"]


def overwrite_job(launch: Launch, config: Any, directory: str) -> str:
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    writer = CheckpointWriter(Path(directory), grid, SavePolicy(asynchronous=False))
    state = snapshot(engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype)
    try:
        writer.save("ckpt_001", state, save_facts(9, 9))
    except CheckpointError as error:
        return str(error)
    return "written over"


def test_nothing_is_written_over(pool: GlooPool, saved: dict[Any, Saved], tmp_path: Path) -> None:
    """A second save under a name that exists is refused on every rank, and not a byte changes."""
    shutil.copytree(saved[(1, 1, 1, 1)].path, tmp_path / "ckpt_001")
    before = tree_of(tmp_path)
    for answer in pool.run(2, overwrite_job, config_on(1, 1, 1), str(tmp_path)):
        assert "already exists" in answer
    assert tree_of(tmp_path) == before


def refusing_disk_job(
    launch: Launch, config: Any, directory: str, where: str, asynchronous: bool
) -> str:
    """Fill the disk at one point of the save, on the last rank only.

    Where only rank 0 writes, on rank 0.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    writer = CheckpointWriter(Path(directory), grid, SavePolicy(asynchronous=asynchronous))
    state = snapshot(engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype)
    facts = save_facts(2, 0)
    writer.save("ckpt_001", state, facts)
    writer.wait()
    on = launch.world_size - 1 if where != "save.synced" else 0
    fault_injection.arm(f"{where}@rank={on}:error=ENOSPC", launch.rank)
    try:
        writer.save("ckpt_002", state, facts)
        writer.wait()
    except SaveError as error:
        return str(error)
    finally:
        fault_injection.arm("", launch.rank)
    return "saved"


@pytest.mark.parametrize("asynchronous", (False, True), ids=("waiting", "asynchronous"))
@pytest.mark.parametrize(
    "where", ("save.begin", "save.model", "save.optimizer", "save.hashed", "save.synced")
)
def test_a_full_disk_is_one_error_on_every_rank(
    pool: GlooPool, tmp_path: Path, where: str, asynchronous: bool
) -> None:
    """No rank waits for a failed one, and the message is one line.

    The checkpoint before stays intact.
    """
    answers = pool.run(2, refusing_disk_job, config_on(1, 1, 1), str(tmp_path), where, asynchronous)
    assert len(set(answers)) == 1
    assert "ckpt_002 could not be saved" in answers[0] and "No space left on device" in answers[0]
    assert len(answers[0].splitlines()) == 1
    assert [path.name for path in list_checkpoints(tmp_path)] == ["ckpt_001"]
    verify_checkpoint(tmp_path / "ckpt_001")
    assert not list(tmp_path.glob("*.tmp")), "what was begun is left behind"


SAVING_LOOP = """
import sys, itertools
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.support.tiny_model import engine_of, grid_of, save_facts, tiny_config
from k2train.checkpoint.save_events import SavePolicy
from k2train.checkpoint.writer import CheckpointWriter, snapshot
from k2train.launch.environment import Launch
from k2train.parallel.grid import start_process_group
import torch
launch = Launch(0, 1, 0, launched=False)
start_process_group(launch, torch.device("cpu"))
config = tiny_config()
grid = grid_of(launch, config)
engine = engine_of(config, grid)
directory = Path(sys.argv[1])
writer = CheckpointWriter(directory, grid, SavePolicy(2, asynchronous=False))
for step in itertools.count(int(sys.argv[2])):
    engine.optimizer.master.fill_(float(step))
    state = snapshot(engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype)
    facts = save_facts(step, step)
    name = f"ckpt_{{step // 2:03d}}" + (f"_step_{{step:06d}}" if step % 2 else "")
    writer.save(name, state, facts)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_9_while_saving(tmp_path: Path) -> None:
    """Kill a process that only saves, thins and drops at 15 random moments.

    Each existing checkpoint is intact, holds one step only, and the newest is at most one behind
    what was reported.
    """
    script = tmp_path / "loop.py"
    script.write_text(SAVING_LOOP.format(root=str(ROOT)))
    runs = tmp_path / "checkpoints"
    runs.mkdir()
    step = 0
    torn = 0
    starts = count(1)
    # Five, and as many more as a kill needs to fall into a save.
    while (start := next(starts)) <= 5 or (not torn and start <= 50):
        process = subprocess.Popen(
            [sys.executable, str(script), str(runs), str(step)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert process.stdout is not None
        reported = step - 1
        # Three chances a start: a process is expensive, a copy of what lies on the disk is not.
        for chance in range(3):
            reported = int(process.stdout.readline())
            time.sleep(random.uniform(0.0, 0.12))
            if chance < 2:
                os.kill(process.pid, signal.SIGSTOP)
                torn += assert_whole(runs, reported)
                os.kill(process.pid, signal.SIGCONT)
        process.kill()
        rest = process.stdout.read().split()
        process.wait()
        reported = int(rest[-1]) if rest else reported
        torn += assert_whole(runs, reported)
        step = manifest_of(list_checkpoints(runs)[-1])["step"] + 1
        for leftover in runs.glob("*.tmp"):
            shutil.rmtree(leftover)
    assert torn > 0, "no kill fell into a save, so this shows nothing"


def assert_whole(runs: Path, reported: int) -> bool:
    """Every finished checkpoint verifies and holds its own step; returns whether a save was cut."""
    found = list_checkpoints(runs)
    assert manifest_of(found[-1])["step"] >= reported, "what was told is gone"
    for path in found[-2:]:
        manifest = verify_checkpoint(path)
        values = compare_runs.tensors_of(path, "model")["head.weight"]
        assert (values == manifest.step).all(), f"{path} mixes steps"
    return any(runs.glob("*.tmp"))


def test_retention(pool: GlooPool, tmp_path: Path) -> None:
    """Removes only optimizer files of old numbered checkpoints and replaced on-demand saves.

    A foreign file stays.
    """
    make_corpus(tmp_path / "data", 4)
    tree = config_tree(
        tmp_path / "data" / "manifest.json", tmp_path / "runs", "kept", run__stop_after_steps=7
    )
    tree["checkpoint"] = {"keep_optimizer_states": 2}
    run = tmp_path / "runs" / "kept"
    assert pool.run(1, trainer_job, tree) == [75]
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == [
        "ckpt_000",
        "ckpt_001",
        "ckpt_001_step_000007",
    ]
    (run / "checkpoints" / "notes.txt").write_text("mine")
    del tree["run"]["stop_after_steps"]
    assert pool.run(1, trainer_job, tree) == [0]
    left = {p.name: (p / "optimizer").exists() for p in list_checkpoints(run / "checkpoints")}
    assert left == {
        "ckpt_000": False,
        "ckpt_001": False,
        "ckpt_002": False,
        "ckpt_003": True,
        "ckpt_004": True,
    }
    for path in list_checkpoints(run / "checkpoints"):
        assert (path / THINNED).exists() != left[path.name]
        verify_checkpoint(path)
    assert (run / "checkpoints" / "notes.txt").read_text() == "mine"
    assert not list((run / "checkpoints").glob("*.tmp"))
