"""Disk space of checkpoints: predicted bytes equal the real ones; refusal before run and save."""

import os
from math import prod
from pathlib import Path
from typing import Any

import pytest

from k2train.checkpoint import disk_space
from k2train.checkpoint.disk_space import (
    CheckpointBytes,
    check_plan,
    free_bytes,
    plan_bytes,
    room_problem,
)
from k2train.checkpoint.save_events import SavePolicy
from k2train.checkpoint.writer import CheckpointWriter, snapshot
from k2train.config.load import Config
from k2train.errors import RunError
from k2train.launch.environment import Launch
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import engine_of, grid_of, save_facts, shapes_of, tiny_config


def save_job(launch: Launch, config: Config, directory: str) -> None:
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    writer = CheckpointWriter(Path(directory), grid, SavePolicy(asynchronous=False))
    state = snapshot(engine.gradients.shard_layout, engine.optimizer.flat_shards, engine.dtype)
    writer.save("ckpt_001", state, save_facts(1, 0))


@pytest.mark.parametrize(("world", "precision"), ((1, "fp32"), (2, "bf16")))
def test_within_two_percent_of_the_real_bytes(
    pool: GlooPool, tmp_path: Path, world: int, precision: str
) -> None:
    """A model of two million parameters, as one rank and as two data-parallel ranks write it."""
    config = tiny_config(
        model__hidden_size=256,
        model__ffn_hidden_size=256,
        model__vocab_size=1000,
        precision=precision,
    )
    pool.run(world, save_job, config, str(tmp_path))
    real = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    shapes = shapes_of(config)
    parameters = sum(prod(shape) for shape in shapes.values())
    one = CheckpointBytes(parameters, 4 if precision == "fp32" else 2, len(shapes), world)
    assert one.whole == pytest.approx(real, rel=0.02)
    optimizer = sum(file.stat().st_size for file in tmp_path.rglob("optimizer/*"))
    assert one.thinned == pytest.approx(real - optimizer, rel=0.05)


ONE = CheckpointBytes(1000, 4)


@pytest.mark.parametrize(
    ("remaining", "keep", "complete", "states"),
    (
        (10, 0, 0, 10),
        (10, 2, 0, 3),
        (10, 2, 2, 1),
        (10, 2, 5, 0),
        (1, 5, 0, 1),
        (0, 2, 2, 0),
        (3, 0, 4, 3),
    ),
)
def test_states_of_the_kept_and_one_in_flight(
    remaining: int, keep: int, complete: int, states: int
) -> None:
    expected = remaining * ONE.thinned + states * 12000
    assert plan_bytes(ONE, remaining, keep, complete) == expected


def test_those_inside_chunks_come_on_top() -> None:
    """Whole ones: weights, manifest and states."""
    expected = 10 * ONE.thinned + 3 * 12000 + 2 * (ONE.thinned + 12000)
    assert plan_bytes(ONE, 10, 2, 0, inside_chunks=2) == expected


def test_a_plan_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, before a directory is made: what it needs, what is free, which knobs."""
    one = CheckpointBytes(65_000_000_000, 2, 723, 120)
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 4 * 10**12)
    with pytest.raises(RunError) as caught:
        check_plan(tmp_path / "runs" / "x", one, 360, 5)
    message = str(caught.value)
    assert (
        len(message.splitlines()) == 1
        and "need 46.88 TiB" in message
        and "3.64 TiB are free" in message
    )
    assert all(
        knob in message
        for knob in ("checkpoint.every_chunks", "keep_optimizer_states", "run.directory")
    )
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 60 * 10**12)
    check_plan(tmp_path, one, 360, 5)


def test_free_bytes_of_a_directory_to_be(tmp_path: Path) -> None:
    facts = os.statvfs(tmp_path)
    found = free_bytes(tmp_path / "not" / "there" / "yet")
    assert found == pytest.approx(facts.f_bavail * facts.f_frsize, rel=0.05)


def test_a_save_that_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 4_100_000_000)
    assert room_problem(tmp_path, "ckpt_007", 4_100_000_000) is None
    message: Any = room_problem(tmp_path, "ckpt_007", 12_300_000_000)
    assert message.startswith(
        f"no space for ckpt_007: needs 11.46 GiB, 3.82 GiB are free in {tmp_path}; free space"
    )
