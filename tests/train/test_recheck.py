"""A step that raises an alarm is computed again: by bits, on every rank, before its update.

Would catch a recheck that changes a bit of an undisturbed run, that names another rank than the one
whose values were wrong, and one that applies what a broken device computed.
"""

from typing import Any, NamedTuple

import pytest
import torch

from k2train import fault_injection
from k2train.launch.environment import Launch
from k2train.train.recheck import Rechecked, StepJudge, UnrepeatableError, ranks_text, recheck_text
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import engine_of, grid_of, split, tiny_config

STEPS = 4
BAD = 3
"""The step that is disturbed or judged."""
TP_PP = {"parallel__tensor": 2, "parallel__pipeline": 2}


class Trained(NamedTuple):
    """What a rank's steps gave."""

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    flags: list[tuple[float, ...]]
    rechecks: list[Rechecked | None]
    weights: bytes
    moments: bytes
    adam_steps: int


def never(loss: float, norm: float) -> bool:
    return False


def trained(
    launch: Launch,
    changes: dict[str, Any],
    faults: str = "",
    judged: bool = True,
    alarm: bool = False,
    leave_out: bool = False,
) -> Trained | str:
    """Train a few steps, with an alarm at step `BAD` if asked for; or the text of the error."""
    config = tiny_config(**changes)
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    fault_injection.arm(faults, launch.rank)
    now = [0]

    def at_bad(loss: float, norm: float) -> bool:
        return now[0] == BAD

    if judged:
        engine.judge = StepJudge(at_bad if alarm else never, True, at_bad if leave_out else never)
    results = []
    try:
        for step in range(1, STEPS + 1):
            now[0] = step
            fault_injection.set_step(step)
            rows = torch.randint(0, 251, (24, 16), generator=torch.Generator().manual_seed(step))
            share = 24 // grid.dp.size
            mine = split(config, rows[grid.dp.rank * share : (grid.dp.rank + 1) * share])
            results.append(engine.train_step(mine, 1e-2, [float(launch.rank == 0), 0.0]))
    except UnrepeatableError as error:
        return str(error)
    finally:
        fault_injection.arm("", launch.rank)
    engine.optimizer.finish()
    return Trained(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        [result.applied for result in results],
        [result.flags for result in results],
        [result.recheck for result in results],
        engine.optimizer.master.numpy().tobytes(),
        engine.optimizer.exp_avg_sq.numpy().tobytes(),
        engine.optimizer.adam_steps,
    )


def numbers(ranks: list[Any]) -> list[Any]:
    """All but the rechecks, which say what happened on the way."""
    return [rank._replace(rechecks=[]) for rank in ranks]


@pytest.mark.parametrize(("world", "changes"), [(1, {}), (2, {}), (4, TP_PP)])
def test_a_recheck_changes_no_bit(pool: GlooPool, world: int, changes: dict[str, Any]) -> None:
    """Catches a second pass that adds to the first one's sums, sends other flags, or moves weights:
    the run is bit for bit the one without a judge.
    """
    plain = pool.run(world, trained, changes, "", False)
    judged = pool.run(world, trained, changes, "", True, True)
    assert numbers(judged) == numbers(plain)
    for rank in judged:
        assert [found is not None for found in rank.rechecks] == [n == BAD for n in range(1, 5)]
        found = rank.rechecks[BAD - 1]
        assert (found.same, found.ranks, found.applied, found.tensors) == (True, (), 2, ())


@pytest.mark.parametrize(
    ("world", "changes", "bad"),
    [
        (1, {}, 0),
        (2, {}, 1),
        (2, {"parallel__overlap": "on", "parallel__bucket_bytes": 1000}, 0),
        (4, TP_PP, 3),
        (4, TP_PP, 0),
    ],
)
def test_the_rank_with_the_wrong_gradient_is_named(
    pool: GlooPool, world: int, changes: dict[str, Any], bad: int
) -> None:
    """Catches a verdict from sums alone, which are wrong on every rank, and a bad step that is
    skipped or applied: the weights are those of the undisturbed run.
    """
    fault = f"gradient@rank={bad}@step={BAD}:nan"
    plain = pool.run(world, trained, changes, "", False)
    broken = pool.run(world, trained, changes, fault)
    assert numbers(broken) == numbers(plain)
    for rank in broken:
        found = rank.rechecks[BAD - 1]
        assert (found.same, found.ranks, found.applied) == (False, (bad,), 3)
        assert found.tensors and len(found.sums) == 3
        assert f"rank {bad} computed two results" in recheck_text(found)


def test_a_wrong_second_pass_is_no_cause(pool: GlooPool) -> None:
    """Catches a recheck that trusts its second pass: of three, the two that are equal count."""
    plain = pool.run(1, trained, {}, "", False)
    (broken,) = pool.run(1, trained, {}, f"gradient@step={BAD}@nth=2:nan", True, True)
    assert numbers([broken]) == numbers(plain)
    found = broken.rechecks[BAD - 1]
    assert (found.same, found.ranks, found.applied) == (False, (0,), 3)


def test_three_results_stop_the_run(pool: GlooPool) -> None:
    """Catches a majority of one."""
    # Each fault counts the visits that no fault before it took.
    faults = f"gradient@rank=1@step={BAD}:nan;gradient@rank=1@step={BAD}:inf"
    errors = pool.run(2, trained, {}, faults)
    assert len(set(errors)) == 1
    assert errors[0].startswith("rank 1 computed the step 3 times from the same state and batch")
    assert "hardware or nondeterminism, not the data" in errors[0]


@pytest.mark.parametrize(("world", "changes"), [(1, {}), (2, {})])
def test_a_step_left_out_changes_nothing(
    pool: GlooPool, world: int, changes: dict[str, Any]
) -> None:
    """Catches moments or the count of updates that move although the update is left out."""
    for rank in pool.run(world, trained, changes, "", True, True, True):
        assert rank.applied == [True, True, False, True]
        assert rank.adam_steps == STEPS - 1
        assert rank.rechecks[BAD - 1] is not None
    left_out = pool.run(1, trained, {}, "", True, False, True)[0]
    plain = pool.run(1, trained, {}, "", False)[0]
    assert left_out.losses[:BAD] == plain.losses[:BAD]
    assert left_out.losses[BAD] != plain.losses[BAD]


def test_ranks_in_words() -> None:
    """Catches a message that blames a rank where only the exchange differs."""
    assert [ranks_text(ranks) for ranks in ((), (3,), (1, 2))] == [
        "the exchange between the ranks",
        "rank 3",
        "ranks 1, 2",
    ]
