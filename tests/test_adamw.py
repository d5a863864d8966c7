"""The sharded AdamW against torch.optim.AdamW, and the step that must change nothing."""

from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from gloo import GlooPool
from k2train.engine import Engine, architecture_of, kernels_of
from k2train.model.initialize import initial_piece
from k2train.model.transformer import Stage
from k2train.optim.adamw import ShardedAdamW
from k2train.parallel.environment import Launch
from k2train.parallel.gradients import GradientBuffer
from k2train.parallel.grid import SINGLE, Axis
from k2train.parallel.shard import Piece, Sharded, named_pieces
from small import grid_of, microbatches_of, tiny_config

STEPS = 30
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
# Rows that do not divide, and fewer rows than ranks; a large decayed tensor so that vector loops run.
TENSORS = {"big.weight": ((37, 9), True), "norm.weight": ((7,), False), "one.weight": ((1, 4), True)}


class Toy(Sharded):
    """Three parameters, one of them without weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = {}
        for name, (shape, decay) in TENSORS.items():
            key = name.replace(".", "_")
            setattr(self, key, nn.Parameter(start_of(name)))
            self.pieces[key] = (Piece(name, shape, None, 0, shape[0], 0, 1.0, decay),)


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


def adamw_job(launch: Launch, kernel: str) -> dict[str, np.ndarray]:
    dp = Axis("dp", launch.world_size, launch.rank, dist.group.WORLD)
    toy = Toy()
    buffer = GradientBuffer([toy], dp, SINGLE["tp"], torch.device("cpu"))
    optimizer = ShardedAdamW(buffer.table, torch.device("cpu"), BETAS, EPS, DECAY, kernel)
    for slot in buffer.table.slots:
        optimizer.adopt(slot.piece, start_of(slot.piece.name))
    for step in range(1, STEPS + 1):
        line = torch.zeros(buffer.table.elements)
        for slot in buffer.table.slots:
            start, stop = slot.rows(dp)
            buffer.table.local(line, slot).copy_(gradient_of(step, slot.piece.name)[start:stop])
        optimizer.step(line, rate_of(step))
    assert optimizer.adam_steps == STEPS
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
    """Catches a bias correction one step off, decay in the wrong group or not scaled by the rate, rows that stand still."""
    expected = torch_adamw()
    for rank, part in enumerate(pool.run(dp, adamw_job, kernel)):
        for name, value in expected.items():
            error = np.abs(part[name] - value).max()
            assert error <= 2e-6 * np.abs(value).max(), f"{name} on rank {rank}: {error}"
            moved = np.abs(value - start_of(name).numpy())
            assert moved.min() > 1e-3, "a value that does not move shows nothing"


def test_which_tensors_decay() -> None:
    """Catches decay on norm weights and none on embedding or head."""
    config = tiny_config(model__num_layers=1)
    a = architecture_of(config)
    with torch.device("meta"):
        stage = Stage(a, range(1), True, True, SINGLE["tp"], False, kernels_of(config))
    assert {piece.name: piece.decay for _, piece in named_pieces(stage)} == {
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
    """Before and after two steps: weights are bf16 and equal the master weights rounded; masters start unrounded."""
    grid = grid_of(launch, config)
    engine = Engine(config, grid)
    told = [masters_start_whole(engine), weights_are_masters(engine)]
    for step in (1, 2):
        engine.train_step(microbatches_of(config, grid, step), 1e-3)
    return [*told, weights_are_masters(engine), engine.optimizer.adam_steps == 2]


def masters_start_whole(engine: Engine) -> bool:
    table = engine.gradients.table
    for slot in table.slots:
        start, stop = slot.rows(table.dp)
        drawn_rows = initial_piece(engine.config.run.seed, slot.piece)[start:stop]
        if not torch.equal(engine.optimizer.view("master", slot), drawn_rows):
            return False
    return True


def weights_are_masters(engine: Engine) -> bool:
    table = engine.gradients.table
    for slot in table.slots:
        start, stop = slot.rows(table.dp)
        weights = slot.piece.of(slot.parameter.detach())[start:stop]
        if weights.dtype != torch.bfloat16 or not torch.equal(
            weights, engine.optimizer.view("master", slot).bfloat16()
        ):
            return False
    return True


@pytest.mark.parametrize(("world", "tensor"), ((1, 1), (2, 1), (3, 1), (2, 2)))
def test_bf16_weights_are_the_rounded_masters(pool: GlooPool, world: int, tensor: int) -> None:
    """Catches masters drawn from rounded weights, and a rank whose weights are not what the optimizer holds."""
    config = tiny_config(precision="bf16", parallel__tensor=tensor, batch__global_sequences=12, model__num_layers=2)
    assert pool.run(world, bf16_job, config) == [[True] * 4] * world


def digest(engine: Engine) -> str:
    """Hash of every bit a step may change on this rank, padding included."""
    made = sha256(str(engine.optimizer.adam_steps).encode())
    for stage in engine.stages.values():
        for parameter in stage.parameters():
            made.update(parameter.detach().numpy().tobytes())
    for state in engine.optimizer.lines:
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
    """Put one value into the gradient of a tensor in one micro-batch, if this rank holds it; the handle, or None."""
    for stage in engine.stages.values():
        for parameter, piece in named_pieces(stage):
            if piece.name == name:
                return parameter.register_hook(_planter(piece, microbatch, value))
    return None


def _planter(piece: Piece, microbatch: int, value: float) -> Any:
    seen = [0]

    def hook(grad: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        if seen[0] - 1 != microbatch:
            return grad
        grad = grad.clone()
        piece.of(grad)[-1] = value
        return grad

    return hook


def skip_job(launch: Launch, config: Any) -> tuple[list[str], int]:
    """A good step, bad ones of every kind, a good step; what was wrong, and how many bad steps there were."""
    grid = grid_of(launch, config)
    lr = config.lr.peak
    control = Engine(config, grid)
    for step in (1, 2):
        control.train_step(microbatches_of(config, grid, step), lr)
    engine = Engine(config, grid)
    engine.train_step(microbatches_of(config, grid, 1), lr)
    before, wrong, count = digest(engine), [], 0
    values = (float("nan"), float("inf"), float("-inf"))
    for rank in range(launch.world_size):
        for name in PLANTED:
            handle = (
                plant(engine, name, count % engine.num_microbatches, values[count % 3]) if rank == grid.rank else None
            )
            held = torch.tensor([float(handle is not None)])
            dist.all_reduce(held)
            if not held.item():
                continue
            count += 1
            result = engine.train_step(microbatches_of(config, grid, 1), lr)
            if handle is not None:
                handle.remove()
            if result.applied or digest(engine) != before:
                wrong.append(f"{name} on rank {rank}: applied {result.applied}")
    run = engine.executor.run
    engine.executor.run = lambda *args: [loss * float("nan") for loss in run(*args)]  # type: ignore[method-assign]
    result = engine.train_step(microbatches_of(config, grid, 1), lr)
    if result.applied or digest(engine) != before or np.isfinite(result.loss) or not np.isfinite(result.grad_norm):
        wrong.append("a loss that is not a number")
    engine.executor.run = run  # type: ignore[method-assign]
    engine.train_step(microbatches_of(config, grid, 2), lr)
    if digest(engine) != digest(control):
        wrong.append("the next good step differs from one without bad steps before it")
    return wrong, count


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "sequence"),
    ((1, 1, 1, False), (2, 1, 1, False), (1, 2, 3, False), (2, 2, 2, True), (2, 2, 2, False)),
)
def test_a_step_that_is_not_finite_changes_nothing(pool: GlooPool, tp: int, pp: int, dp: int, sequence: bool) -> None:
    """Catches a rank that steps while others skip, moments touched before the check, and a replica nobody looks at."""
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
