"""Layers that were changed after they were built, and whoever looks into one.

The reference is the same layer run part by part.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils.parametrize import register_parametrization

from k2train.launch.environment import Launch
from k2train.model.transformer import Block
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.parallel.tensor_parallel import RowLinear
from k2train.train.engine import Engine
from tests.support.gloo_pool import GlooPool
from tests.support.tiny_model import engine_of, grid_of, tiny_config


def blocks_of(engine: Engine) -> list[Block]:
    return [cast(Block, block) for s in engine.stages.values() for block in s.blocks.values()]


def touched_job(launch: Launch, config: Any) -> list[tuple[str, int]]:
    """The function that a layer ends with, and calls of a hook, for each way to reach its parts."""
    x = torch.zeros(config.data.sequence_length, 2, config.model.hidden_size, requires_grad=True)
    engine = engine_of(config, grid_of(launch, config))
    block, rotary = blocks_of(engine)[0], engine.stages[0].rotary
    called: list[str] = []

    def name() -> str:
        called.clear()
        y = block(x, rotary)
        y.sum().backward()
        return type(y.grad_fn).__name__

    found = []
    for part in (block.attention.qkv, block.mlp.down, block.attention_norm):
        for register in (
            part.register_forward_hook,
            part.register_forward_pre_hook,
            part.register_full_backward_hook,
            part.register_full_backward_pre_hook,
        ):
            handle = register(lambda *_: called.append("hook"))
            found.append((name(), len(called)))
            handle.remove()

    found.append((name(), 1))
    kernel, block.attention.kernel = block.attention.kernel, lambda q, k, v, mask: v
    found.append((name(), 1))
    block.attention.kernel = kernel
    return found


def test_hooks_of_parts_and_another_attention_are_heeded(pool: GlooPool) -> None:
    """Catches a probe on a part of a layer that is silently not called, and a kernel put in after
    the layer was built that is silently not used.
    """
    [found] = pool.run(1, touched_job, tiny_config())
    *hooked, (untouched, _), (replaced, _) = found
    assert untouched == "_LayerBackward"
    assert all(name != "_LayerBackward" and calls == 1 for name, calls in hooked), hooked
    assert replaced != "_LayerBackward"


class Doubled(nn.Module):
    """Twice what another module computes; as a parametrization twice a weight."""

    def __init__(self, inner: nn.Module | None = None):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * (x if self.inner is None else self.inner(x))


class DoubledRow(RowLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def doubled(owner: Any, name: str) -> None:
    """Replace a function by one whose results are doubled."""
    was = getattr(owner, name)

    def twice(*args: Any) -> Any:
        found = was(*args)
        return 2 * found if isinstance(found, torch.Tensor) else tuple(2 * one for one in found)

    setattr(owner, name, twice)


def new_weight(part: Any) -> None:
    part.weight = nn.Parameter(2 * part.weight.detach())


CHANGED: dict[str, Callable[[Any], object]] = {
    "a part": lambda block: setattr(block.mlp, "down", Doubled(block.mlp.down)),
    "a class": lambda block: setattr(block.mlp.down, "__class__", DoubledRow),
    "a method of a part": lambda block: doubled(block.attention, "forward"),
    "a method of the layer": lambda block: doubled(block, "activate"),
    "a norm's kernel": lambda block: doubled(block.mlp_norm, "norm"),
    "a split": lambda block: doubled(block.attention, "split"),
    "an activation": lambda block: doubled(block.mlp, "swiglu"),
    "a parametrization": lambda block: register_parametrization(
        block.mlp.down, "weight", Doubled()
    ),
    "a weight": lambda block: new_weight(block.mlp.gate_up),
    "a norm's weight": lambda block: new_weight(block.mlp_norm),
    "a frozen weight": lambda block: block.attention.qkv.weight.requires_grad_(False),
    "a frozen norm": lambda block: block.mlp_norm.weight.requires_grad_(False),
}
"""Changes of a layer of an engine, each of which changes numbers."""


def results_of(engine: Engine, block: Block, x: torch.Tensor) -> list[Any]:
    """Output, gradient of the input, and sum and gradient of each weight of the layer."""
    engine.gradients.zero()
    x = x.clone().requires_grad_()
    y = block(x, engine.stages[0].rotary)
    y.square().sum().backward()
    found: list[Any] = [y.detach().tolist(), cast(torch.Tensor, x.grad).tolist()]
    for name, weight in block.named_parameters():
        accumulator = accumulator_of(weight)
        total = None if accumulator is None else accumulator.total.tolist()
        found.append((name, total, None if weight.grad is None else weight.grad.tolist()))
    return found


def changed_job(launch: Launch, config: Any, case: str, as_one: bool) -> tuple[list[Any], Any]:
    """Results of a layer that was changed, and of the same one before."""
    engine = engine_of(config, grid_of(launch, config))
    block = blocks_of(engine)[0]
    block.formulas = block.formulas if as_one else None
    x = torch.randn(16, 2, config.model.hidden_size, generator=torch.Generator().manual_seed(1))
    before = results_of(engine, block, x)
    CHANGED[case](block)
    return results_of(engine, block, x), before


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_layer_computes_what_its_parts_compute(pool: GlooPool, case: str) -> None:
    """Catches an adapter, another kernel or a new weight that is silently not used, a frozen
    weight that is trained, and a gradient that is lost.
    """
    config = tiny_config(model__num_kv_heads=2)
    [(found, before)] = pool.run(1, changed_job, config, case, True)
    [(parts, _)] = pool.run(1, changed_job, config, case, False)
    assert found == parts
    assert found != before, "the change changes nothing"
    if "frozen" in case:
        [(_, total, grad)] = [one for one in found[2:] if one not in before]
        assert not np.any(total) and grad is None


def heard_job(launch: Launch, config: Any) -> list[int]:
    """Calls of hooks on a weight and of hooks of all modules, a step of a layer each."""
    engine = engine_of(config, grid_of(launch, config))
    block = blocks_of(engine)[0]
    weight, x = block.mlp.down.weight, torch.ones(16, 2, config.model.hidden_size)
    called: list[str] = []

    def hook(*_: Any) -> None:
        called.append("hook")

    counts = []
    for register in (
        weight.register_hook,
        weight.register_post_accumulate_grad_hook,
        register_module_forward_pre_hook,
        register_module_forward_hook,
        register_module_full_backward_hook,
    ):
        called.clear()
        handle = register(hook)
        try:
            results_of(engine, block, x)
        finally:
            handle.remove()
        counts.append(len(called))
    return counts


def test_hooks_of_weights_and_of_all_modules_are_called(pool: GlooPool) -> None:
    """Catches a profiler or a probe that silently sees a layer and none of its parts."""
    [counts] = pool.run(1, heard_job, tiny_config())
    assert counts == [1, 1, 8, 8, 8], "a layer, and the seven parts that it calls"
