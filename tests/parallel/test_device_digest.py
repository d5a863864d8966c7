"""State digests: on every grid those of the whole tensors, with the same root on every rank."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2train.checkpoint.load import load_states
from k2train.checkpoint.manifest import read_manifest
from k2train.checkpoint.save_events import SavePolicy
from k2train.checkpoint.writer import CheckpointWriter, snapshot
from k2train.launch.environment import Launch
from k2train.parallel.device_digest import (
    Multipliers,
    RootAllReduce,
    StateAudit,
    StateDigest,
    tensor_sums,
)
from k2train.parallel.grid import start_process_group
from k2train.state_digest import block_sums, digest_text, state_root
from k2train.train.engine import Engine
from tests.support.command_line import HANG_SECONDS
from tests.support.gloo_pool import GlooPool
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

ROOT = Path(__file__).resolve().parents[2]
STATES = ("master", "exp_avg", "exp_avg_sq")


def digest_of(engine: Engine) -> StateDigest:
    return StateDigest(engine.gradients.shard_layout, engine.names, STATES, engine.tp)


def fill(engine: Engine, whole: dict[str, np.ndarray]) -> None:
    """This rank's rows of whole tensors given by NAME.state."""
    for slot in engine.gradients.shard_layout.slots:
        param_slice, (low, high) = slot.param_slice, slot.rows(engine.grid.dp)
        for state in STATES:
            values = whole[f"{param_slice.name}.{state}"]
            if param_slice.dim is not None:
                values = values.take(
                    range(param_slice.start, param_slice.stop), axis=param_slice.dim
                )
            engine.optimizer.view(state, slot).copy_(torch.from_numpy(values[low:high]))


def root_job(launch: Launch, config: Any, whole: dict[str, np.ndarray]) -> Any:
    engine = engine_of(config, grid_of(launch, config), fill=False)
    fill(engine, whole)
    root = RootAllReduce(digest_of(engine), engine.grid.host)(engine.optimizer.flat_shards, 11, 9)
    return root.root, dict(root.digests)


GRIDS = (
    ("one", 1, {}),
    ("dp2", 2, {}),
    ("dp3", 3, {}),
    ("tp2", 2, {"parallel__tensor": 2}),
    ("tp2-sequence-dp2", 4, {"parallel__tensor": 2, "parallel__sequence": True}),
    ("pp2", 2, {"parallel__pipeline": 2}),
    ("tp4", 4, {"parallel__tensor": 4}),
    (
        "interleaved-dp2",
        4,
        {
            "parallel__pipeline": 2,
            "parallel__schedule": "interleaved",
            "parallel__stages_per_rank": 2,
        },
    ),
    (
        "zb-v",
        2,
        {"parallel__pipeline": 2, "parallel__schedule": "zb-v", "parallel__stages_per_rank": 2},
    ),
    ("bf16-tp2", 2, {"parallel__tensor": 2, "precision": "bf16"}),
)


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray]:
    """Every state of every tensor, drawn without the framework."""
    rng = np.random.Generator(np.random.Philox(key=3))
    return {
        f"{name}.{state}": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes_of(tiny_config()).items()
        for state in STATES
    }


@pytest.mark.parametrize(
    ("world", "changes"), [grid[1:] for grid in GRIDS], ids=[grid[0] for grid in GRIDS]
)
def test_every_grid_gives_the_digests_of_the_whole(
    pool: GlooPool, whole: dict[str, np.ndarray], world: int, changes: dict[str, Any]
) -> None:
    """Over cut rows and columns, copies counted once, an uneven vocabulary (251) and ranks with no
    row at all.
    """
    expected = {
        name: digest_text(block_sums(v, [0] * v.ndim, v.shape)) for name, v in whole.items()
    }
    for root, digests in pool.run(world, root_job, tiny_config(**changes), whole):
        assert digests == expected
        assert root == state_root(expected, 11, 9)


def test_narrow_tensor_leaves_ranks_without_rows(pool: GlooPool) -> None:
    """Five data-parallel ranks for a norm of four: the last has no row of it."""
    changes = {
        "batch__global_sequences": 10,
        "model__hidden_size": 4,
        "model__num_heads": 1,
        "model__num_kv_heads": 1,
    }
    config = tiny_config(**changes)
    rng = np.random.Generator(np.random.Philox(key=4))
    whole = {
        f"{name}.{state}": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes_of(config).items()
        for state in STATES
    }
    expected = {
        name: digest_text(block_sums(v, [0] * v.ndim, v.shape)) for name, v in whole.items()
    }
    assert [found[1] for found in pool.run(5, root_job, config, whole)] == [expected] * 5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", ((1,), (900,), (3, 40001), (30000, 3), (5, 3, 4)))
def test_torch_equals_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Two implementations of one number: tools read files with the one what the other made in
    training.
    """
    values = torch.randn(shape).to(dtype)
    bits = values.view(torch.int16).numpy() if dtype is torch.bfloat16 else values.numpy()
    factors = Multipliers(40000, 50000)
    found = tensor_sums(values, 0, 0, factors)
    assert digest_text(found.tolist()) == digest_text(block_sums(bits, [0] * len(shape), shape))


def trained_job(launch: Launch, config: Any) -> Any:
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    root = RootAllReduce(digest_of(engine), grid.host)
    roots = [root(engine.optimizer.flat_shards, 0, 0).root]
    for step in (1, 2, 3):
        engine.train_step(microbatches_of(config, grid, step), 1e-3)
        roots.append(root(engine.optimizer.flat_shards, step, engine.optimizer.adam_steps).root)
    return roots, local_gradients(engine, engine.optimizer.master)


def test_pipelines_train_to_the_same_roots(pool: GlooPool) -> None:
    """The first law in one string a step: pipeline layouts change no bit of weights or moments."""
    runs = [pool.run(n, trained_job, tiny_config(parallel__pipeline=n)) for n in (1, 2)]
    assert runs[0][0][0] == runs[1][0][0] == runs[1][1][0]
    assert len(set(runs[0][0][0])) == 4, "each step has a root of its own"
    other = pool.run(1, trained_job, tiny_config(run__seed=8))[0][0]
    assert not set(other) & set(runs[0][0][0])
    weights = [assemble([part for _, part in run], shapes_of(tiny_config())) for run in runs]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def guard_job(launch: Launch, config: Any) -> Any:
    """What the guard says untouched, not asked to look, and after damage on rank 1; then once
    more.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    engine.train_step(microbatches_of(config, grid, 1), 1e-3)
    digest, shards = digest_of(engine), engine.optimizer.flat_shards
    guard, root = StateAudit(digest), RootAllReduce(digest)
    found = [guard.problem(shards)]
    slot = engine.gradients.shard_layout.slots[2]

    for damage in ("", "exp_avg", "master"):
        guard.keep(root(shards, 1, 1).local_sums)
        engine.evaluate(microbatches_of(config, grid, 2))
        engine.gradients.zero()
        if damage and launch.rank == 1:
            engine.optimizer.view(damage, slot).view(torch.int32).view(-1)[-1] ^= 1
        found.append(guard.problem(shards))

    found.append(guard.problem(shards))
    return found, slot.param_slice.name


@pytest.mark.parametrize(
    ("world", "changes"), ((2, {}), (2, {"parallel__tensor": 2}), (2, {"parallel__pipeline": 2}))
)
def test_a_line_that_changes_between_updates_is_seen(
    pool: GlooPool, world: int, changes: dict[str, Any]
) -> None:
    """The lowest bit of one moment or master weight on one rank: named on all; an untouched line
    never is.
    """
    results = pool.run(world, guard_job, tiny_config(**changes))
    text = f"{results[1][1]}.{{}} on rank 1 changed between two updates, when nothing writes it"
    expected = [None, None, text.format("exp_avg"), text.format("master"), None]
    assert [found for found, _ in results] == [expected] * world


def save_job(launch: Launch, config: Any, directory: str) -> str:
    """Two steps, a save; the root of what was saved."""
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    for step in (1, 2):
        engine.train_step(microbatches_of(config, grid, step), 1e-2)

    shards, updates = engine.optimizer.flat_shards, engine.optimizer.adam_steps
    root = RootAllReduce(digest_of(engine), grid.host)(shards, 2, updates).root
    writer = CheckpointWriter(Path(directory), grid, SavePolicy(asynchronous=False))
    state = snapshot(engine.gradients.shard_layout, shards, engine.dtype)
    writer.save("ckpt_001", state, save_facts(2, updates))

    return root


def load_job(launch: Launch, config: Any, path: str) -> str:
    """The root of what was loaded."""
    grid = grid_of(launch, config)
    engine = engine_of(config, grid, fill=False)
    manifest = read_manifest(Path(path))
    load_states(
        Path(path), engine.gradients.shard_layout, engine.optimizer.flat_shards, grid, engine.dtype
    )
    return RootAllReduce(digest_of(engine), grid.host)(
        engine.optimizer.flat_shards, manifest.step, manifest.adam_steps
    ).root


@pytest.mark.parametrize(
    "source", (4, pytest.param(6, marks=pytest.mark.slow)), ids=("tp2-sequence-dp2", "tp4")
)
def test_a_root_survives_saving_and_loading_elsewhere(
    pool: GlooPool, tmp_path: Path, source: int
) -> None:
    """Saved on one grid and loaded on others: one root, and it is the manifest's."""
    _, world, changes = GRIDS[source]
    (root,) = set(pool.run(world, save_job, tiny_config(**changes), str(tmp_path)))
    path = tmp_path / "ckpt_001"
    assert read_manifest(path).state.root == root
    for _, others, layout in (GRIDS[0], GRIDS[2], GRIDS[8]):
        assert set(pool.run(others, load_job, tiny_config(**layout), str(path))) == {root}


def steps_main(steps: int, seed: int) -> None:
    """A process of its own: some steps on one rank, then the root on its standard output."""
    launch = Launch(0, 1, 0, launched=False)
    start_process_group(launch, torch.device("cpu"))
    config = tiny_config(run__seed=seed)
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    for step in range(1, steps + 1):
        engine.train_step(microbatches_of(config, grid, step), 1e-3)
    root = RootAllReduce(digest_of(engine), grid.host)(
        engine.optimizer.flat_shards, steps, engine.optimizer.adam_steps
    ).root
    print(root)


@pytest.mark.slow
def test_run_twice() -> None:
    """60 steps in two processes that share nothing but the machine: the same root.

    `docs/faults.md` has 200 of them.
    """
    program = "from tests.parallel.test_device_digest import steps_main; steps_main(60, 7)"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begun = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    roots = [process.communicate(timeout=HANG_SECONDS)[0].split()[-1] for process in begun]
    assert [process.returncode for process in begun] == [0, 0]
    assert roots[0] == roots[1] and len(roots[0]) == 64
