"""Replica check: planted damage is found with tensor and rank, and all ranks get the same
message.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from k2train.launch.environment import Launch
from k2train.parallel.replica_check import ReplicaReport, diagnose_replicas, replica_problem
from k2train.parallel.shard_layout import BufferSlot
from k2train.plan.layout import Layout
from k2train.train.engine import Engine
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import engine_of, grid_of, microbatches_of, tiny_config

EMBEDDING, DOWN, LAST_NORM, NORM = (
    "embedding.weight", "layers.1.mlp.down.weight", "norm.weight", "layers.0.mlp_norm.weight"
)  # fmt: skip


def plant(engine: Engine, slot: BufferSlot, kind: str, index: int) -> None:
    """Damage one element of this rank's copy: of the weights in use, or of a line of the
    optimizer.
    """
    shard = kind in engine.optimizer.flat_shards
    flat = (
        engine.optimizer.view(kind, slot) if shard else slot.param_slice.of(slot.parameter.data)
    ).view(-1)
    if kind == "nan":
        flat[index] = float("nan")
        return
    bits = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
    # The next number of its size; or a flipped bit that rounding to bf16 does not hide.
    bits[index] ^= {"ulp": 1, "exponent": 1 << 10}.get(kind, 1 << 20)


def damage_job(
    launch: Launch, config: Any, plants: list[tuple[int, str, str, int]]
) -> list[str | None]:
    """After a step, one answer without damage, then one for each planted and undone."""
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    engine.train_step(microbatches_of(config, grid, 1), 1e-3)
    engine.optimizer.finish()
    shard_layout, shards = engine.gradients.shard_layout, engine.optimizer.flat_shards
    answers = [replica_problem(shard_layout, shards, grid)]
    kept = {id(slot.parameter): slot.parameter.data.clone() for slot in shard_layout.slots}
    kept_shards = {state: shard.clone() for state, shard in shards.items()}

    for rank, name, kind, index in plants:
        found = [slot for slot in shard_layout.slots if slot.param_slice.name == name]
        if launch.rank == rank:
            plant(engine, found[0], kind, index)
        answers.append(replica_problem(shard_layout, shards, grid))
        for state, shard in shards.items():
            shard.copy_(kept_shards[state])
        for slot in shard_layout.slots:
            slot.parameter.data.copy_(kept[id(slot.parameter)])

    answers.append(replica_problem(shard_layout, shards, grid))
    return answers


def check(
    pool: GlooPool, world: int, expected: list[tuple[int, str, str, int, str]], **changes: Any
) -> None:
    """Every rank gets the expected line for each plant, and None before and after."""
    plants = [row[:4] for row in expected]
    for answers in pool.run(world, damage_job, tiny_config(**changes), plants):
        assert answers == [None, *(row[4] for row in expected), None]


def used(name: str, ranks: str) -> str:
    return f"weights of {name} on {ranks} are not those of the other copies and of the optimizer"


def bad_master(name: str, rank: int) -> str:
    return f"master weights of {name} on rank {rank} do not round to the weights in use"


@pytest.mark.parametrize(("precision", "overlap"), (("fp32", "off"), ("bf16", "on")))
def test_two_copies_are_told_apart(pool: GlooPool, precision: str, overlap: str) -> None:
    """With two ranks there is no majority. The optimizer's rows name the damaged one."""
    expected = [
        (rank, name, kind, index, used(name, f"rank {rank}"))
        for rank in (0, 1)
        for name, kind in ((EMBEDDING, "ulp"), (NORM, "exponent"))
        for index in (0, -1)
    ]
    expected.append((1, DOWN, "nan", 3, f"weights of {DOWN} are not finite on rank 1"))
    expected.append((1, DOWN, "master", 0, bad_master(DOWN, 1)))
    check(pool, 2, expected, precision=precision, parallel__overlap=overlap)


def test_three_copies(pool: GlooPool) -> None:
    """The damaged one is named, be it the first, the middle or the last; rows of 251 do not divide
    by three.
    """
    expected = [
        (rank, EMBEDDING, "ulp", 5000, used(EMBEDDING, f"rank {rank}")) for rank in range(3)
    ]
    check(
        pool,
        3,
        [*expected, (2, EMBEDDING, "master", 7, bad_master(EMBEDDING, 2))],
        precision="bf16",
    )


@pytest.mark.parametrize("sequence", (False, True))
def test_whole_tensors_over_tensor_ranks(pool: GlooPool, sequence: bool) -> None:
    """Norms that drift apart between two tensor-parallel ranks (BLOOM's, for weeks): either may be
    wrong, both are named.
    """
    expected = [
        (1, NORM, "master", 3, f"{NORM}.master on one of ranks 0, 1 differs from the other copies"),
        (
            0,
            LAST_NORM,
            "exp_avg",
            0,
            f"{LAST_NORM}.exp_avg on one of ranks 0, 1 differs from the other copies",
        ),
        (
            1,
            NORM,
            "exp_avg_sq",
            31,
            f"{NORM}.exp_avg_sq on one of ranks 0, 1 differs from the other copies",
        ),
    ]
    check(pool, 2, expected, parallel__tensor=2, parallel__sequence=sequence)


def test_tensor_and_data_parallel(pool: GlooPool) -> None:
    """Ranks are (dp, tp) = 0 0, 0 1, 1 0, 1 1; what is cut over tp is compared over dp only."""
    expected = [
        (3, DOWN, "ulp", 1, used(DOWN, "rank 3")),
        (2, NORM, "ulp", 1, used(NORM, "rank 2")),
        (1, NORM, "master", 1, bad_master(NORM, 1)),
        (
            2,
            NORM,
            "exp_avg",
            1,
            f"{NORM}.exp_avg on one of ranks 2, 3 differs from the other copies",
        ),
    ]
    check(pool, 4, expected, precision="bf16", parallel__tensor=2, parallel__sequence=True)


def test_each_pipeline_rank_has_its_own_tensors(pool: GlooPool) -> None:
    """A finding of one stage reaches the ranks that do not hold the tensor.

    One rank per stage has a copy in bf16.
    """
    expected = [
        (1, EMBEDDING, "ulp", 0, used(EMBEDDING, "rank 1")),
        (2, LAST_NORM, "exponent", 0, used(LAST_NORM, "rank 2")),
    ]
    check(pool, 4, expected, parallel__pipeline=2)
    alone = [
        (1, LAST_NORM, "ulp", 0, bad_master(LAST_NORM, 1)),
        (0, EMBEDDING, "nan", 0, f"weights of {EMBEDDING} are not finite on rank 0"),
    ]
    check(pool, 2, alone, parallel__pipeline=2, precision="bf16")
    # In fp32 the weights of one rank are its master weights: nothing differs, and it still is no
    # number.
    check(pool, 2, alone[1:], parallel__pipeline=2)


def test_ranks_without_rows(pool: GlooPool) -> None:
    """Five ranks for a norm of four: the last owns no row of it, and its copy counts like any
    other.
    """
    changes = {
        "batch__global_sequences": 10,
        "model__hidden_size": 4,
        "model__num_heads": 1,
        "model__num_kv_heads": 1,
    }
    check(pool, 5, [(4, NORM, "ulp", 2, used(NORM, "rank 4"))], **changes)


def test_more_than_two_tensor_ranks_have_a_majority() -> None:
    """The odd one of four is named; two against two, and three of whom each says something else,
    are all named.
    """

    def diagnosis(*digests: str) -> str | None:
        held = [{"n": replace(SOUND, states={"master": "m", "exp_avg": text})} for text in digests]
        return diagnose_replicas(held, Layout(tensor=len(digests)))

    assert diagnosis(*"aaba") == "n.exp_avg on rank 2 differs from the other copies"
    assert (
        diagnosis(*"abba") == "n.exp_avg on one of ranks 0, 1, 2, 3 differs from the other copies"
    )
    assert diagnosis(*"abc") == "n.exp_avg on one of ranks 0, 1, 2 differs from the other copies"
    assert diagnosis(*"aaa") is None


SOUND = ReplicaReport("a", "a", True, True, None)


def test_conclusions() -> None:
    """What cannot be planted one at a time: several wrong at once, and nobody who is right."""
    layout = Layout(data=3)
    one, odd = replace(SOUND, used="b", own_rows=False), replace(SOUND, used="c", expected="d")
    assert diagnose_replicas([{"w": SOUND}] * 3, layout) is None
    assert diagnose_replicas([{"w": SOUND}, {"w": one}, {"w": one}], layout) == used(
        "w", "ranks 1, 2"
    )
    stale = replace(SOUND, expected="d")
    assert diagnose_replicas(
        [{"w": replace(stale, own_rows=False)}, {"w": odd}, {"w": stale}], layout
    ) == (f"{used('w', 'rank 1')}; {bad_master('w', 0)}")
    both = [{"w": replace(stale, used=text)} for text in "xy"]
    assert diagnose_replicas(both, Layout(data=2)) == used("w", "ranks 0, 1")
    many = [{name: SOUND for name in "pqrst"}, {name: one for name in "pqrst"}]
    assert str(diagnose_replicas(many, Layout(data=2))).endswith("; and 2 more findings")
