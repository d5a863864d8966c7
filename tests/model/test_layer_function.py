"""A layer as one autograd function: the bits of its parts, in every layout, and when it is used."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import nn

from k2train.launch.environment import Launch
from k2train.model.architecture import Architecture
from k2train.model.kernels import elementwise
from k2train.model.kernels.documents import Documents
from k2train.model.kernels.formulas import FUSED
from k2train.model.kernels.select import DeviceTraits, choose_kernels
from k2train.model.layers import Rotary
from k2train.model.transformer import Block
from k2train.parallel.grad_accumulation import (
    GradAccumulator,
    WeightGradStore,
    accumulator_of,
    attach,
)
from k2train.parallel.grid import SINGLE
from k2train.parallel.shard import Sharded
from k2train.train.engine import Engine
from tests.support.gloo_pool import GlooPool
from tests.support.kept_memory import Made, known_of
from tests.support.tiny_model import (
    engine_of,
    grid_of,
    local_gradients,
    microbatches_of,
    tiny_config,
)

SMALL = {"batch__global_sequences": 8, "model__num_layers": 2}


def blocks_of(engine: Engine) -> list[Block]:
    return [cast(Block, block) for s in engine.stages.values() for block in s.blocks.values()]


def bits_job(launch: Launch, config: Any, as_one: bool) -> tuple[bool, list[Any]]:
    """Whether all layers have formulas; losses, norms and weights of two steps."""
    torch.set_num_threads(1)
    grid = grid_of(launch, config)
    engine = engine_of(config, grid)
    blocks = blocks_of(engine)
    able = all(block.formulas is not None for block in blocks)
    for block in blocks:
        block.formulas = block.formulas if as_one else None

    found: list[Any] = []
    for step in (1, 2):
        result = engine.train_step(microbatches_of(config, grid, step), 1e-2)
        found.append((result.loss, result.grad_norm, result.applied))
    held = local_gradients(engine, engine.optimizer.master)
    found.extend((name, block, values.tobytes()) for name, (block, values) in held.items())
    return able, found


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {"model__num_kv_heads": 2}),
        (1, {"data__sequence_length": 80, "precision": "bf16"}),
        (1, {"kernels__matmul": "upcast", "precision": "bf16"}),
        (1, {"run": {"name": "t", "seed": 7, "exact": True}, "batch__micro_sequences": 4}),
        (2, {"parallel__tensor": 2, "parallel__sequence": False, "parallel__overlap": "on"}),
        (2, {"parallel__tensor": 2, "parallel__gathered": "keep"}),
        (2, {"parallel__overlap": "on"}),
        (2, {"parallel__pipeline": 2, "parallel__schedule": "zb-h1"}),
        (
            4,
            {
                "parallel__tensor": 2,
                "parallel__pipeline": 2,
                "parallel__schedule": "zb-h2",
                "parallel__overlap": "on",
                "parallel__gathered": "again",
            },
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_no_bit_differs_from_the_parts(pool: GlooPool, world: int, changes: dict[str, Any]) -> None:
    """Catches a wrong gradient, another order of sums, a collective or a deferred weight gradient
    that is left out: autograd runs the same parts one by one.
    """
    config = tiny_config(**SMALL, **changes)
    whole, parts = (pool.run(world, bits_job, config, as_one) for as_one in (True, False))
    assert all(able for able, _ in whole), "the layers of this config are no single functions"
    assert whole == parts


def uses_job(launch: Launch, config: Any) -> str:
    """Name of the function that a layer of a training engine ends with."""
    engine = engine_of(config, grid_of(launch, config))
    x = torch.zeros(config.data.sequence_length, 2, config.model.hidden_size, requires_grad=True)
    y = blocks_of(engine)[0](x, engine.stages[0].rotary)
    return type(y.grad_fn).__name__


@pytest.mark.parametrize(
    ("changes", "as_one"),
    [
        ({}, True),
        ({"kernels__recompute": "selective"}, False),
        ({"kernels__recompute": "full"}, False),
        ({"kernels__attention": "sdpa"}, False),
        ({"kernels__norm": "torch"}, False),
        ({"kernels__elementwise": "reference"}, False),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_only_what_has_formulas_runs_as_one(
    pool: GlooPool, changes: dict[str, Any], as_one: bool
) -> None:
    """Catches a kernel or a policy that was asked for and is silently replaced, and a layer that
    is slow again.
    """
    [name] = pool.run(1, uses_job, tiny_config(**changes))
    assert (name == "_LayerBackward") == as_one


def misused_job(launch: Launch, config: Any) -> list[str]:
    """Errors of a layer whose input is overwritten, that goes backward twice, or whose weight is
    another one by then; and its output after a change in place.
    """
    engine = engine_of(config, grid_of(launch, config))
    block, rotary = blocks_of(engine)[0], engine.stages[0].rotary
    leaf = torch.ones(16, 2, config.model.hidden_size, requires_grad=True)

    def told(y: torch.Tensor) -> str:
        try:
            y.sum().backward(retain_graph=True)
        except (RuntimeError, AssertionError) as error:
            return str(error)
        return "done"

    x = leaf * 1
    y = block(x, rotary)
    with torch.no_grad():
        x.mul_(3)
    found = [told(y)]

    y = block(leaf * 1, rotary)
    found += [told(y.mul_(2)), told(y)]

    y, weight = block(leaf * 1, rotary), block.mlp.down.weight
    block.mlp.down.weight = nn.Parameter(weight.detach())
    found.append(told(y))
    block.mlp.down.weight = weight

    weights = {"mlp.down.weight": (2 * weight.detach()).requires_grad_()}
    y = torch.func.functional_call(block, weights, (leaf * 1, rotary))
    return [*found, told(y)]


def test_what_a_layer_cannot_do_is_an_error(pool: GlooPool) -> None:
    """Catches gradients of an input, or of a weight, that is not the one of the forward."""
    [found] = pool.run(1, misused_job, tiny_config())
    overwritten, in_place, again, replaced, functional = found
    assert "modified by an inplace operation" in overwritten
    assert in_place == "done" and "backward a second time" in again
    assert "replaced" in replaced and "replaced" in functional


def written_out(block: Block, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """A layer in torch's operators, x [s, b, h]; of the papers, and not of our parts."""
    s, b, _ = x.shape
    n, kv = block.attention.heads, block.attention.kv_heads

    def norm(y: torch.Tensor, part: Any) -> torch.Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + part.eps).sqrt() * part.weight

    def turned(y: torch.Tensor) -> torch.Tensor:
        half = torch.cat((-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]), -1)
        return y * rotary.cos[:s] + half * rotary.sin[:s]

    packed = norm(x, block.attention_norm) @ block.attention.qkv.weight.t()
    q, k, v = packed.view(s, b, n + 2 * kv, -1).split((n, kv, kv), 2)
    q, k = turned(q), turned(k)
    k, v = k.repeat_interleave(n // kv, 2), v.repeat_interleave(n // kv, 2)
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) / q.shape[-1] ** 0.5
    scores = scores + torch.full((s, s), -torch.inf).triu(1)
    mixed = torch.einsum("bnij,jbnd->ibnd", scores.softmax(-1), v).reshape(s, b, -1)
    x = x + mixed @ block.attention.output.weight.t()

    gate, up = (norm(x, block.mlp_norm) @ block.mlp.gate_up.weight.t()).chunk(2, -1)
    return x + (gate / (1 + (-gate).exp()) * up) @ block.mlp.down.weight.t()


@pytest.mark.parametrize(
    ("s", "b", "heads", "kv_heads", "width"),
    [(1, 1, 1, 1, 2), (7, 3, 6, 2, 4), (65, 2, 3, 3, 6), (130, 1, 5, 1, 2), (64, 2, 4, 2, 8)],
)
def test_the_gradients_are_those_of_torch_in_float64(
    s: int, b: int, heads: int, kv_heads: int, width: int
) -> None:
    """Catches a wrong formula, at any length, number of heads or width of a head, also for a
    gradient with gaps and for two micro-batches: autograd differentiates the papers' formulas.
    """
    torch.manual_seed(s)
    hidden = heads * width
    a = Architecture(1, hidden, 3 * hidden + 1, heads, kv_heads, 11, 1e-5, 1e4, 0.3)
    block = Block(0, a, SINGLE["tp"], choose_kernels(attention="plain")).double()
    for part in block.modules():
        if isinstance(part, Sharded):
            part.weight_grad_store = WeightGradStore()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.5)
    rotary = Rotary(width, s + 3, 1e4, torch.device("cpu"))

    batches = [torch.randn(s, b, hidden, dtype=torch.float64) for _ in range(2)]
    factors = [torch.randn(b, s, hidden, dtype=torch.float64).transpose(0, 1) for _ in batches]
    wanted: list[torch.Tensor] = []
    for x, factor in zip(batches, factors, strict=True):
        (written_out(block, x.requires_grad_(), rotary) * factor).sum().backward()
        wanted.append(cast(torch.Tensor, x.grad))
    sums = {name: cast(torch.Tensor, weight.grad) for name, weight in block.named_parameters()}

    for weight in block.parameters():
        weight.grad = None
        attach(weight, GradAccumulator(torch.zeros_like(weight)))
    for x, factor, dx in zip(batches, factors, wanted, strict=True):
        x.grad = None
        y = block(x, rotary)
        assert type(y.grad_fn).__name__ == "_LayerBackward"
        y.backward(factor)
        torch.testing.assert_close(x.grad, dx, rtol=1e-9, atol=1e-9)
    for name, weight in block.named_parameters():
        accumulator = accumulator_of(weight)
        assert accumulator is not None and weight.grad is None
        torch.testing.assert_close(accumulator.total, sums[name], rtol=1e-9, atol=1e-9)


def test_a_layer_with_documents_runs_part_by_part() -> None:
    """Catches a layer that runs as one function, and attends across borders at which it stops."""
    a, cpu = Architecture(1, 12, 20, 3, 3, 11, 1e-5, 1e4, 0.3), torch.device("cpu")
    stops = choose_kernels(attention="plain", traits=DeviceTraits(cpu, block=True))
    assert Block(0, a, SINGLE["tp"], stops).formulas is None

    # Kernels that know no documents refuse them, as one function or part by part.
    block = Block(0, a, SINGLE["tp"], choose_kernels(attention="plain"))
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.5)
        attach(weight, GradAccumulator(torch.zeros_like(weight)))
    rotary, x = Rotary(4, 6, 1e4, cpu), torch.randn(6, 1, 12, requires_grad=True)
    assert type(block(x, rotary).grad_fn).__name__ == "_LayerBackward"
    borders = Documents(torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32))
    with pytest.raises(AssertionError, match="documents are packed before this kernel"):
        block(x, rotary, borders)


def midway_job(launch: Launch, config: Any, as_one: bool) -> int:
    """Bytes held when the backward of a layer comes to its rotary split."""
    engine = engine_of(config, grid_of(launch, config))
    block, stage = blocks_of(engine)[0], engine.stages[0]
    x = torch.ones(16, 2, config.model.hidden_size, requires_grad=True)
    dy = torch.ones_like(x)
    held: list[int] = []
    module: Any = elementwise
    split = module.split_backward

    def looked(*args: Any) -> torch.Tensor:
        held.append(made.still_bytes())
        return split(*args)

    block.formulas = replace(FUSED, split_backward=looked) if as_one else None
    module.split_backward = looked
    try:
        with Made(known_of(stage, x, dy)) as made:
            y = block(x, stage.rotary)
            torch.autograd.backward(y, dy)
    finally:
        module.split_backward = split
    return held[0]


def test_each_part_frees_what_it_has_used(pool: GlooPool) -> None:
    """Catches a layer that holds everything until its backward ends."""
    config = tiny_config()
    [whole], [parts] = (pool.run(1, midway_job, config, as_one) for as_one in (True, False))
    assert whole <= parts
