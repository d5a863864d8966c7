"""`run.exact`: the same bits for every micro-batch size, data-parallel and pipeline degree."""

from functools import cache
from math import fsum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from k2train.launch.environment import Launch
from k2train.model.initialize import attach_rotary
from k2train.model.kernels.threads import one_thread
from k2train.parallel.grid import Axis
from k2train.parallel.shard import named_slices
from k2train.record.metrics import latest
from k2train.train import exact_mode
from k2train.train.engine_parts import build_stages
from k2train.train.exact_mode import ExactMode
from k2train.train.setup import Setup, architecture_of
from tests.support.gloo_pool import GlooPool
from tests.support.lanes import lanes
from tests.support.tiny_corpus import audited_tree, make_corpus, trainer_job
from tests.support.tiny_model import (
    assemble,
    engine_of,
    global_batch,
    grid_of,
    local_gradients,
    microbatches_of,
    shapes_of,
    split,
    tiny_config,
)

SMALL: dict[str, Any] = {
    "run__exact": True,
    "model__num_layers": 2,
    "batch__global_sequences": 12,
    "batch__micro_sequences": 1,
}
STEPS = 2


def job(launch: Launch, config: Any, steps: int = STEPS) -> dict[str, Any]:
    """Some steps; this rank's rows of weights, moments and last gradients, and the held-out loss.

    With `data.cross_documents: block` a row has three documents.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    reduced, reduce = [], engine.gradients.reduce

    def keep() -> torch.Tensor:
        shard = reduce()
        reduced.append(local_gradients(engine, shard))
        return shard

    engine.gradients.reduce = keep  # type: ignore[method-assign]
    results = []
    for step in range(1, steps + 1):
        batch = microbatches_of(config, grid, step)
        if engine.setup.block:
            documents = torch.arange(config.data.sequence_length).mul(3).floor_divide(16).int()
            rows = torch.cat([part.tokens for part in batch])
            batch = split(config, rows, documents.expand(len(rows), -1).contiguous())
        result = engine.train_step(batch, config.lr.peak)
        results.append((result.loss, result.grad_norm, tuple(result.norms.values())))

    states = engine.optimizer.flat_shards
    return {
        "results": results,
        "rows": engine.row_losses(batch, engine.setup.num_microbatches).numpy(),
        "gradients": reduced[-1],
        **{name: local_gradients(engine, shard) for name, shard in states.items()},
    }


class Run:
    """What a layout did, put together from its ranks."""

    def __init__(self, pool: GlooPool, world: int, **changes: Any):
        config = tiny_config(**{**SMALL, **changes})
        parts = pool.run(world, job, config)
        self.results, self.rows = parts[0]["results"], parts[0]["rows"]
        assert all(part["results"] == self.results for part in parts), "ranks disagree"
        shapes = shapes_of(config)
        self.tensors = {
            (kind, name): value
            for kind in ("gradients", "master", "exp_avg", "exp_avg_sq")
            for name, value in assemble([part[kind] for part in parts], shapes).items()
        }

    def differences(self, other: "Run") -> list[Any]:
        found: list[Any] = [] if self.results == other.results else ["results"]
        found += [] if np.array_equal(self.rows, other.rows) else ["rows"]
        return found + [
            key
            for key, value in self.tensors.items()
            if value.tobytes() != other.tensors[key].tobytes()
        ]


@pytest.fixture(scope="module")
def one_process(pool: GlooPool) -> Any:
    @cache
    def run(**changes: Any) -> Run:
        return Run(pool, 1, **changes)

    return run


BLOCK = {"data__cross_documents": "block"}
BF16 = {"precision": "bf16"}
LEAF = {"batch__exact_leaf": 3}


def layout(pp: int = 1, kind: str = "1f1b", micro: int = 1, v: int = 1) -> dict[str, Any]:
    return {
        "parallel__pipeline": pp,
        "parallel__schedule": kind,
        "parallel__stages_per_rank": v,
        "batch__micro_sequences": micro,
    }


CASES = [
    # dp, layout, what it shares with the one process
    (1, layout(micro=2), {}),
    (1, layout(micro=4), BF16),
    (2, layout(micro=2), BLOCK),
    (2, layout(2, "zb-h1", 3), {}),
    (3, layout(micro=4), BF16),
    (4, layout(micro=3), LEAF),
    (1, layout(2, "zb-h2", 2), BF16),
    (2, layout(micro=6), BF16),
    (2, layout(2, "1f1b", 2), BLOCK),
    (2, layout(2, "1f1b", 2), BF16),
    (4, layout(2, "zb-h1", 1), BF16),
    (6, layout(micro=2), {}),
    (2, layout(1, "1f1b", 2), {"kernels__recompute": "full"}),
    (2, layout(2, "1f1b", 1), LEAF),
    (3, layout(2, "gpipe", 2), {"parallel__bucket_bytes": 1000}),
]


@pytest.mark.parametrize(*lanes(("dp", "changes", "shared"), CASES, lambda case: case in CASES[:6]))
def test_a_layout_changes_no_bit(
    pool: GlooPool, one_process: Any, dp: int, changes: dict[str, Any], shared: dict[str, Any]
) -> None:
    """Of loss, norms, gradients, weights, moments and held-out losses. Rows of 48 and 251 are
    split over 2 to 6 ranks.
    """
    world = dp * changes["parallel__pipeline"]
    run = Run(pool, world, **changes, **shared)
    assert run.differences(one_process(**shared)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("zb-v", "interleaved"))
def test_stages_in_turns_change_no_bit(pool: GlooPool, one_process: Any, kind: str) -> None:
    run = Run(pool, 4, **layout(2, kind, 3, 2), model__num_layers=4)
    assert run.differences(one_process(model__num_layers=4)) == []


def test_without_it_the_bits_do_change(pool: GlooPool, one_process: Any) -> None:
    """The cases above can fail: with plain sums they do."""
    plain = {"run__exact": False}
    base = one_process(**plain)
    assert "results" in Run(pool, 1, **layout(micro=2), **plain).differences(base)
    assert "results" in Run(pool, 2, **layout(micro=1), **plain).differences(base)
    # Nor are the bits of a leaf of another size the same ones.
    assert one_process(**LEAF).differences(one_process()) != []


def single_gradients_job(launch: Launch, config: Any) -> dict[str, np.ndarray]:
    """Gradients of each sequence's share of the mean loss, by autograd: [sequences, ...] by name.

    By a stage of its own, which no gradient buffer knows.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    (stage,) = build_stages(
        grid, engine.architecture, engine.tp, engine.kernels, engine.dtype
    ).values()
    attach_rotary([stage], engine.architecture, config.data.sequence_length, grid.device)
    stage.load_state_dict(engine.stages[0].state_dict())

    found: dict[str, list[np.ndarray]] = {}
    for row in global_batch(config, 1):
        stage.zero_grad()
        tokens = row.unsqueeze(0)
        stage.loss(stage(tokens), tokens, 1.0 / engine.setup.targets).backward()
        for parameter, param_slice in named_slices(stage):
            assert parameter.grad is not None
            rows = param_slice.of(parameter.grad).clone().numpy()
            found.setdefault(param_slice.name, []).append(rows)
    return {name: np.stack(parts) for name, parts in found.items()}


def test_against_exact_sums_of_single_gradients(pool: GlooPool) -> None:
    """A tree of 12 leaves is 4 roundings from the exact sum of autograd's own gradients.

    Catches a unit that is counted twice, left out, or scaled by another number.
    """
    config = tiny_config(**SMALL)
    names = architecture_of(config).tensor_names()
    (parts,), (run,) = pool.run(1, single_gradients_job, config), pool.run(1, job, config, 1)
    for name, each in parts.items():
        rows = each.reshape(len(each), -1).astype(np.float64)
        exact = np.array([fsum(column) for column in rows.T.tolist()])
        found = run["gradients"][name][1].reshape(-1).astype(np.float64)
        assert (np.abs(found - exact) <= 4 * 2.0**-24 * np.abs(rows).sum(0)).all(), name
        norm = fsum((found**2).tolist()) ** 0.5
        assert run["results"][0][2][names.index(name)] == pytest.approx(norm, rel=1e-14)


def test_resumed_on_another_degree_it_is_the_same_run(pool: GlooPool, tmp_path: Path) -> None:
    """Two runs of 10 steps: on one rank; and on two, then three, with other micro-batches."""
    make_corpus(tmp_path / "data", 2)
    exact = {"run__exact": True, "model__num_layers": 2}
    assert pool.run(1, trainer_job, audited_tree(tmp_path, "straight", **exact)) == [0]
    for world, micro, limit in ((2, 2, 3), (3, 4, 4), (1, 6, None)):
        tree = audited_tree(tmp_path, "moved", run__stop_after_steps=limit, **exact)
        tree["batch"]["micro_sequences"] = micro
        assert pool.run(world, trainer_job, tree) == [75 if limit else 0] * world

    rows = [latest(tmp_path / "runs" / name / "metrics.jsonl") for name in ("straight", "moved")]
    facts = [[(r.step, r.loss, r.grad_norm, r.state_root) for r in run] for run in rows]
    assert facts[0] == facts[1] and len(facts[0]) == 10
    assert all(root for *_, root in facts[0])


def test_each_loss_has_its_place() -> None:
    """Catches losses of several ranks in one place. fp64 seldom shows it in so small a sum."""
    setup = Setup.of(tiny_config(**SMALL), 2)
    grid: Any = SimpleNamespace(dp=Axis("dp", 2, 1, None), device=torch.device("cpu"))
    mode = ExactMode(setup, grid)
    rows = torch.arange(1.0, 7.0)
    for row in rows:
        mode.loss(lambda hidden, targets: hidden.sum(), row.view(1, 1, 1), torch.zeros(1, 1))
    assert mode.losses().tolist() == [0.0] * 6 + rows.tolist()
    assert mode.losses().tolist() == [0.0] * 12, "the losses of a step are kept for the next"


def test_one_thread_while_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process with several threads, and one that is left with a single thread."""
    set_to: list[int] = []
    monkeypatch.setattr(exact_mode.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(exact_mode.torch, "set_num_threads", set_to.append)
    with one_thread(False):
        assert set_to == []
    with pytest.raises(KeyError), one_thread(True):
        assert set_to == [1]
        raise KeyError
    assert set_to == [1, 4]
