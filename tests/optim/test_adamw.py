"""Sharded AdamW against torch.optim.AdamW, and the step that must change nothing."""

import gc
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from k2train.launch.environment import Launch
from k2train.model.initialize import initial_slice
from k2train.model.transformer import Stage
from k2train.optim.adamw import Hyperparameters, ShardedAdamW
from k2train.parallel.grad_accumulation import GradAccumulator, accumulator_of
from k2train.parallel.grad_buffer import GradientBuffer
from k2train.parallel.grid import SINGLE, Axis
from k2train.parallel.shard import ParamSlice, Sharded, named_slices
from k2train.train.engine import Engine
from k2train.train.setup import Setup, architecture_of
from k2train.train.setup_kernels import kernels_of
from tests.support.gloo_pool import GlooPool
from tests.support.lanes import lanes
from tests.support.tiny_model import engine_of, grid_of, microbatches_of, tiny_config

STEPS = 30
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
# Rows that do not divide, and fewer rows than ranks; a large decayed tensor so that vector loops
# run.
TENSORS = {
    "big.weight": ((37, 9), True),
    "norm.weight": ((7,), False),
    "one.weight": ((1, 4), True),
}


class Toy(Sharded):
    """Three parameters, one of them without weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.slices = {}
        for name, (shape, decay) in TENSORS.items():
            key = name.replace(".", "_")
            setattr(self, key, nn.Parameter(start_of(name)))
            self.slices[key] = (ParamSlice(name, shape, None, 0, shape[0], 0, 1.0, decay),)


def drawn(seed: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + len(name))
    return torch.randn(TENSORS[name][0], generator=generator)


def start_of(name: str) -> torch.Tensor:
    return drawn(0, name)


def gradient_of(step: int, name: str) -> torch.Tensor:
    """Sizes that differ by 1e6 between steps, so that a wrong moment or correction shows."""
    return drawn(step, name) * 10.0 ** (-(step % 7))


def rate_of(step: int) -> float:
    return 0.01 * (1 + step % 5)


def adamw_job(launch: Launch, kernel: str, overlap: bool) -> dict[str, np.ndarray]:
    """Gradients come ten times too large, with the divisor that makes up for it."""
    dp = Axis("dp", launch.world_size, launch.rank, dist.group.WORLD, overlap=overlap)
    toy = Toy()
    buffer = GradientBuffer([toy], dp, SINGLE["tp"], torch.device("cpu"))
    # Buckets of one parameter each.
    optimizer = ShardedAdamW(
        buffer.shard_layout,
        torch.device("cpu"),
        Hyperparameters(BETAS, EPS, DECAY),
        kernel,
        bucket_bytes=1,
    )
    for slot in buffer.shard_layout.slots:
        optimizer.set_master(slot.param_slice, start_of(slot.param_slice.name))

    for step in range(1, STEPS + 1):
        shard = torch.zeros(buffer.shard_layout.elements)
        for slot in buffer.shard_layout.slots:
            start, stop = slot.rows(dp)
            buffer.shard_layout.local(shard, slot).copy_(
                gradient_of(step, slot.param_slice.name)[start:stop] * 10
            )
        optimizer.step(shard, rate_of(step), torch.tensor(10.0), torch.tensor(0.0))
        optimizer.count(applied=True)

    assert optimizer.adam_steps == STEPS
    optimizer.wait_for(toy)
    return {name: getattr(toy, name.replace(".", "_")).detach().numpy() for name in TENSORS}


def torch_adamw() -> dict[str, np.ndarray]:
    values = {name: start_of(name).requires_grad_() for name in TENSORS}
    groups = [
        {"params": [v for n, v in values.items() if TENSORS[n][1]], "weight_decay": DECAY},
        {"params": [v for n, v in values.items() if not TENSORS[n][1]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS, foreach=False)

    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step)
        for name, value in values.items():
            value.grad = gradient_of(step, name)
        optimizer.step()

    return {name: value.detach().numpy() for name, value in values.items()}


@pytest.mark.parametrize("kernel", ("fused", "reference"))
@pytest.mark.parametrize("dp", (1, 2, 3))
def test_equals_torchs_adamw_on_any_number_of_ranks(pool: GlooPool, dp: int, kernel: str) -> None:
    """Catches a bias correction one step off, decay in the wrong group or not scaled by the rate,
    rows that stand still.
    """
    expected = torch_adamw()
    for rank, part in enumerate(pool.run(dp, adamw_job, kernel, dp == 3)):
        for name, value in expected.items():
            error = np.abs(part[name] - value).max()
            assert error <= 2e-6 * np.abs(value).max(), f"{name} on rank {rank}: {error}"
            moved = np.abs(value - start_of(name).numpy())
            assert moved.min() > 1e-3, "a value that does not move shows nothing"


@pytest.mark.parametrize("kernel", ("fused", "reference"))
def test_a_step_refused_on_the_device_touches_nothing(kernel: str) -> None:
    """Catches an update that is multiplied by 0 instead of left out: 0 times what is not a number
    is none either.
    """
    buffer = GradientBuffer([Toy()], SINGLE["dp"], SINGLE["tp"], torch.device("cpu"))
    optimizer = ShardedAdamW(
        buffer.shard_layout, torch.device("cpu"), Hyperparameters(BETAS, EPS, DECAY), kernel
    )
    for shard in optimizer.flat_shards.values():
        shard.copy_(torch.linspace(1.0, 2.0, buffer.shard_layout.elements))
    before = {name: shard.clone() for name, shard in optimizer.flat_shards.items()}
    nan = torch.tensor(float("nan"))
    optimizer.step(
        torch.full_like(optimizer.master, float("nan")), 0.1, divisor=nan, skip=torch.tensor(1.0)
    )
    optimizer.count(applied=False)
    assert optimizer.adam_steps == 0
    assert all(torch.equal(shard, before[name]) for name, shard in optimizer.flat_shards.items())
    optimizer.step(
        torch.ones_like(optimizer.master), 0.1, torch.tensor(2.0), skip=torch.tensor(0.0)
    )
    assert all(bool((shard != before[name]).all()) for name, shard in optimizer.flat_shards.items())


def test_which_tensors_decay() -> None:
    """Catches decay on norm weights and none on embedding or head."""
    config = tiny_config(model__num_layers=1)
    a = architecture_of(config)
    with torch.device("meta"):
        stage = Stage(a, range(1), True, True, SINGLE["tp"], kernels_of(Setup.of(config, 1)))

    assert {param_slice.name: param_slice.decay for _, param_slice in named_slices(stage)} == {
        "embedding.weight": True,
        "layers.0.attention_norm.weight": False,
        "layers.0.attention.query.weight": True,
        "layers.0.attention.key.weight": True,
        "layers.0.attention.value.weight": True,
        "layers.0.attention.output.weight": True,
        "layers.0.mlp_norm.weight": False,
        "layers.0.mlp.gate.weight": True,
        "layers.0.mlp.up.weight": True,
        "layers.0.mlp.down.weight": True,
        "norm.weight": False,
        "head.weight": True,
    }


def bf16_job(launch: Launch, config: Any) -> list[bool]:
    """Before and after two steps: weights are bf16 and equal the master weights rounded; masters
    start unrounded.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    results = [masters_start_whole(engine), weights_are_masters(engine)]
    for step in (1, 2):
        engine.train_step(microbatches_of(config, grid, step), 1e-3)
    return [*results, weights_are_masters(engine), engine.optimizer.adam_steps == 2]


def masters_start_whole(engine: Engine) -> bool:
    shard_layout = engine.gradients.shard_layout
    for slot in shard_layout.slots:
        start, stop = slot.rows(shard_layout.dp)
        drawn_rows = initial_slice(engine.config.run.seed, slot.param_slice)[start:stop]
        if not torch.equal(engine.optimizer.view("master", slot), drawn_rows):
            return False
    return True


def weights_are_masters(engine: Engine) -> bool:
    shard_layout = engine.gradients.shard_layout
    for slot in shard_layout.slots:
        start, stop = slot.rows(shard_layout.dp)
        weights = slot.param_slice.of(slot.parameter.detach())[start:stop]
        if weights.dtype != torch.bfloat16 or not torch.equal(
            weights, engine.optimizer.view("master", slot).bfloat16()
        ):
            return False
    return True


@pytest.mark.parametrize(("world", "tensor"), ((1, 1), (2, 1), (3, 1), (2, 2)))
def test_bf16_weights_are_the_rounded_masters(pool: GlooPool, world: int, tensor: int) -> None:
    """Catches masters drawn from rounded weights, and a rank whose weights are not what the
    optimizer holds.
    """
    config = tiny_config(
        precision="bf16", parallel__tensor=tensor, batch__global_sequences=12, model__num_layers=2
    )
    assert pool.run(world, bf16_job, config) == [[True] * 4] * world


def digest(engine: Engine) -> str:
    """Hash of every bit a step may change on this rank, padding included."""
    made = sha256(str(engine.optimizer.adam_steps).encode())
    for stage in engine.stages.values():
        for parameter in stage.parameters():
            made.update(parameter.detach().numpy().tobytes())
    for state in engine.optimizer.flat_shards:
        made.update(getattr(engine.optimizer, state).numpy().tobytes())
    return made.hexdigest()


PLANTED = (
    "embedding.weight",
    "layers.0.attention_norm.weight",
    "layers.1.attention.key.weight",
    "layers.1.mlp.down.weight",
    "norm.weight",
    "head.weight",
)


def plant(engine: Engine, name: str, microbatch: int, value: float) -> Any:
    """Put one value into the gradient of a tensor in one micro-batch, if this rank holds it; how to
    end it, or None.
    """
    for stage in engine.stages.values():
        for parameter, param_slice in named_slices(stage):
            if param_slice.name == name:
                accumulator = accumulator_of(parameter)
                assert accumulator is not None, "no accumulator was attached"
                kept = accumulator.arrived
                accumulator.arrived = _planter(accumulator, param_slice, microbatch, value)
                return lambda: setattr(accumulator, "arrived", kept)
    return None


def _planter(
    accumulator: GradAccumulator, param_slice: ParamSlice, microbatch: int, value: float
) -> Any:
    arrived, seen = accumulator.arrived, [0]

    def planted() -> None:
        seen[0] += 1
        if seen[0] - 1 == microbatch:
            param_slice.of(accumulator.total)[-1] = value
        assert arrived is not None, "nobody counts"
        arrived()

    return planted


def skip_job(launch: Launch, config: Any) -> tuple[list[str], int]:
    """A good step, bad ones of every kind, a good step; what was wrong, and how many bad steps
    there were.
    """
    grid = grid_of(launch, config)
    lr = config.lr.peak
    control = engine_of(config, grid)
    for step in (1, 2):
        control.train_step(microbatches_of(config, grid, step), lr)

    engine = engine_of(config, grid)
    engine.train_step(microbatches_of(config, grid, 1), lr)
    before, wrong, count = digest(engine), [], 0
    values = (float("nan"), float("inf"), float("-inf"))

    for rank in range(launch.world_size):
        for name in PLANTED:
            end = (
                plant(engine, name, count % engine.setup.num_microbatches, values[count % 3])
                if rank == grid.rank
                else None
            )
            held = torch.tensor([float(end is not None)])
            dist.all_reduce(held)
            if not held.item():
                continue
            count += 1
            result = engine.train_step(microbatches_of(config, grid, 1), lr)
            if end is not None:
                end()
            if result.applied or digest(engine) != before:
                wrong.append(f"{name} on rank {rank}: applied {result.applied}")

    run = engine.executor.run
    engine.executor.run = lambda *args: [loss * float("nan") for loss in run(*args)]  # type: ignore[method-assign]
    result = engine.train_step(microbatches_of(config, grid, 1), lr)

    if (
        result.applied
        or digest(engine) != before
        or np.isfinite(result.loss)
        or not np.isfinite(result.grad_norm)
    ):
        wrong.append("a loss that is not a number")

    engine.executor.run = run  # type: ignore[method-assign]
    engine.train_step(microbatches_of(config, grid, 2), lr)
    if digest(engine) != digest(control):
        wrong.append("the next good step differs from one without bad steps before it")

    return wrong, count


@pytest.mark.parametrize(
    *lanes(
        ("tp", "pp", "dp", "sequence"),
        ((1, 1, 1, False), (2, 1, 1, False), (1, 2, 3, False), (2, 2, 2, True)),
        lambda case: case in ((1, 1, 1, False), (2, 2, 2, True)),
    )
)
def test_a_step_that_is_not_finite_changes_nothing(
    pool: GlooPool, tp: int, pp: int, dp: int, sequence: bool
) -> None:
    """Catches a rank that steps while others skip, moments touched before the check, and a replica
    nobody looks at.

    Every axis alone or beside one other, and all of them; without sequence parallelism on one.
    """
    config = tiny_config(
        model__num_layers=2,
        parallel__tensor=tp,
        parallel__pipeline=pp,
        parallel__sequence=sequence,
        batch__global_sequences=12,
    )
    parts = pool.run(tp * pp * dp, skip_job, config)
    for wrong, count in parts:
        assert wrong == []
        assert count == len(PLANTED) * tp * dp, "each tensor is held by the ranks of one stage"


def overlap_job(launch: Launch, config: Any) -> tuple[list[Any], dict[str, Any], bool]:
    """Three steps and an evaluation; results, masters, and whether a gather was still under way
    after the last step.
    """
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    results = []

    for step in (1, 2, 3):
        result = engine.train_step(microbatches_of(config, grid, step), config.lr.peak)
        results.append((result.loss, result.grad_norm, result.applied))
    under_way = bool(engine.optimizer.param_gather._pending)
    results.append(engine.evaluate(microbatches_of(config, grid, 99)))

    return (
        results,
        {name: shard.numpy().copy() for name, shard in engine.optimizer.flat_shards.items()},
        under_way,
    )


@pytest.mark.parametrize(
    *lanes(
        ("pp", "dp", "precision", "stages"),
        (
            (1, 2, "fp32", {}),
            (2, 2, "bf16", {}),
            (1, 3, "fp32", {}),
            (1, 2, "fp32", {"parallel__schedule": "zb-v", "parallel__stages_per_rank": 2}),
        ),
        lambda case: case[1] == 2 and case[2:] != ("fp32", {}),
    )
)
def test_overlap_and_buckets_change_no_bit(
    pool: GlooPool, pp: int, dp: int, precision: str, stages: dict[str, Any]
) -> None:
    """Catches weights read before they have come, in any stage of a rank, a bucket that leaves
    before its last gradient, sums in another order.
    """
    fixed = {
        "parallel__pipeline": pp,
        "precision": precision,
        "batch__global_sequences": 12,
        "lr__peak": 1e-2,
        **stages,
    }
    runs = {}
    for overlap, size in (("off", None), ("on", None), ("on", 20_000), ("off", 20_000)):
        config = tiny_config(**fixed, parallel__overlap=overlap, parallel__bucket_bytes=size)
        runs[overlap, size] = pool.run(pp * dp, overlap_job, config)

    base = runs["off", None]
    for (overlap, size), parts in runs.items():
        for rank, (results, shards, under_way) in enumerate(parts):
            assert results == base[rank][0], (overlap, size, rank)
            assert all(
                np.array_equal(shard, base[rank][1][name]) for name, shard in shards.items()
            ), (
                overlap,
                size,
                rank,
            )
            assert under_way == (overlap == "on"), (
                "nothing was under way, so nothing was waited for"
            )


def memory_job(launch: Launch, config: Any) -> list[int]:
    """Bytes of all tensors alive in this process after steps 5, 10, 15 and 20."""
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    batches, results = microbatches_of(config, grid, 1), []

    for step in range(1, 21):
        engine.train_step(batches, config.lr.peak)
        if step % 5 == 0:
            # What is under way holds tensors for as long as the machine takes.
            engine.optimizer.finish()
            gc.collect()
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects()
                if type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu"
            }
            results.append(sum(storages.values()))

    return results


@pytest.mark.parametrize(("dp", "overlap"), ((1, "off"), (2, "off"), (2, "on")))
def test_nothing_grows_from_step_to_step(pool: GlooPool, dp: int, overlap: str) -> None:
    """Catches transfers, hooks or losses that are kept: a run of a million steps would end out of
    memory.
    """
    config = tiny_config(model__num_layers=1, batch__global_sequences=4, parallel__overlap=overlap)
    for results in pool.run(dp, memory_job, config):
        assert len(set(results)) == 1 and results[0] > 0, results
