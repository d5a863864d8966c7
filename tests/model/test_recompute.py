"""Activation recomputation: same bits, nothing recomputed without need, memory freed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from k2train.data.loader import MicroBatch
from k2train.launch.environment import Launch
from k2train.model.kernels.select import choose_kernels
from k2train.model.recompute import Cheap, run_layer
from tests.support.gloo_pool import GlooPool
from tests.support.kept_memory import Made
from tests.support.lanes import lanes
from tests.support.tiny_model import (
    assemble,
    engine_of,
    grid_of,
    microbatches_of,
    shapes_of,
    tiny_config,
    train_job,
)

STEPS = 2
POLICIES = ("none", "selective", "full")
SMALL = {"batch__global_sequences": 8, "model__num_kv_heads": 2}


class Toy:
    """A layer whose every part counts its calls: x + tanh(exp(w x)) w, with a product's own saved
    input.
    """

    def __init__(self) -> None:
        self.weight = torch.linspace(-1, 1, 36).view(6, 6).requires_grad_()
        self.calls = {"norm": 0, "product": 0, "activate": 0, "last": 0}
        self.midway: Callable[[], None] = lambda: None
        """Called when the backward pass has gone through half of the layer."""

    def norm(self, x: Tensor) -> Tensor:
        self.calls["norm"] += 1
        return torch.sin(x)

    def product(self, x: Tensor) -> Tensor:
        self.calls["product"] += 1
        return x @ self.weight

    def inner(self, x: Tensor, cheap: Cheap, *args: Any) -> tuple[Tensor, Tensor]:
        x = x + cheap(self.norm, x, self.product)
        if x.requires_grad:
            x.register_hook(lambda gradient: self.midway())
        return x, cheap(self.norm, x, self.product)

    def activate(self, x: Tensor) -> Tensor:
        self.calls["activate"] += 1
        return torch.cos(x)

    def outer(self, residual: Tensor, x: Tensor) -> Tensor:
        self.calls["last"] += 1
        return residual + x @ self.weight


def through_toy(policy: str) -> tuple[dict[str, int], list[Tensor], int, int, int]:
    """(calls in all, gradients, bytes kept after the forward, bytes there midway through the
    backward, bytes left)
    """
    toy, midway = Toy(), []
    x = torch.linspace(-2, 2, 60).view(10, 6).requires_grad_()
    with Made([x, toy.weight]) as made:
        y = run_layer(toy, x, policy)
        kept = made.still_bytes() - y.untyped_storage().nbytes()
        toy.midway = lambda: midway.append(made.still_bytes())
        y.backward(torch.ones_like(y))

    assert x.grad is not None and toy.weight.grad is not None
    gradients = [x.grad.clone(), toy.weight.grad.clone()]
    del y
    x.grad = toy.weight.grad = None
    return toy.calls, gradients, kept, midway[0], made.still_bytes()


@pytest.mark.parametrize(
    ("policy", "calls", "tensors"),
    [
        ("none", {"norm": 2, "product": 2, "activate": 1, "last": 1}, 5),
        ("selective", {"norm": 4, "product": 2, "activate": 2, "last": 1}, 2),
        ("full", {"norm": 4, "product": 4, "activate": 2, "last": 1}, 0),
    ],
)
def test_each_policy_keeps_and_repeats_what_it_says(
    policy: str, calls: dict[str, int], tensors: int
) -> None:
    """Catches a last product computed again for nothing, a cheap part kept, other gradients, memory
    that stays.
    """
    _, wanted, _, half, _ = through_toy("none")
    made, gradients, kept, midway, left = through_toy(policy)
    assert made == calls
    assert midway <= half, "what has been used is given back at the layer's end only"
    # Of 10 x 6: none keeps two sines, the sum, what cosine is taken of and the cosine (x is the
    # caller's).
    assert kept == tensors * 240
    assert left == 0
    for gradient, same in zip(gradients, wanted, strict=True):
        assert torch.equal(gradient, same)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_evaluation_keeps_nothing_and_computes_once(policy: str) -> None:
    """Catches what is kept, and what is computed twice, where there is no backward pass."""
    toy, x = Toy(), torch.ones(10, 6)
    with torch.no_grad(), Made([x, toy.weight]) as made:
        y = run_layer(toy, x, policy)
    assert toy.calls == {"norm": 2, "product": 2, "activate": 1, "last": 1}
    assert made.still_bytes() == y.untyped_storage().nbytes()


def test_an_unknown_policy_is_our_own_bug() -> None:
    """Catches a policy that falls through to keeping nothing or everything."""
    with pytest.raises(AssertionError, match="'half' is none of"):
        run_layer(Toy(), torch.ones(10, 6), "half")


def test_the_first_layers_of_a_stage_recompute() -> None:
    """Catches an off-by-one, a null that means none, and a count that is lost on the way from the
    config.
    """
    assert choose_kernels(recompute="full", recompute_layers=2).recompute_of(3) == [
        "full",
        "full",
        "none",
    ]
    assert choose_kernels(recompute="selective").recompute_of(2) == ["selective", "selective"]
    assert choose_kernels(recompute="full", recompute_layers=0).recompute_of(2) == ["none", "none"]
    assert "recompute full in 2 layers a stage" in str(
        choose_kernels(recompute="full", recompute_layers=2)
    )


def run(pool: GlooPool, world: int, **changes: Any) -> Any:
    config = tiny_config(**SMALL, **changes)
    parts = pool.run(world, train_job, config, STEPS)
    shapes = shapes_of(config)
    return (
        [part["results"] for part in parts],
        parts[0]["held_out"],
        assemble([part["weights"] for part in parts], shapes),
        assemble([part["gradients"][-1] for part in parts], shapes),
    )


GRIDS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"precision": "bf16"}),
    (2, {"parallel__tensor": 2, "parallel__sequence": True, "parallel__gathered": "keep"}),
    (
        2,
        {
            "parallel__tensor": 2,
            "parallel__sequence": True,
            "parallel__gathered": "again",
            "parallel__overlap": "on",
        },
    ),
    (2, {"parallel__tensor": 2, "parallel__sequence": False, "parallel__overlap": "on"}),
    (4, {"parallel__tensor": 2, "parallel__sequence": True, "parallel__pipeline": 2}),
    (2, {"parallel__pipeline": 2, "parallel__schedule": "gpipe", "precision": "bf16"}),
    (2, {"parallel__pipeline": 2, "parallel__schedule": "zb-h1"}),
    (
        4,
        {
            "parallel__tensor": 2,
            "parallel__gathered": "again",
            "parallel__pipeline": 2,
            "parallel__schedule": "zb-v",
            "parallel__stages_per_rank": 2,
        },
    ),
]


@pytest.mark.parametrize(
    *lanes(("world", "changes"), GRIDS, lambda case: case[0] != 2 or case == GRIDS[3]), ids=str
)
def test_no_policy_changes_a_bit(pool: GlooPool, world: int, changes: dict[str, Any]) -> None:
    """Catches a norm made again from rounded numbers, collectives in another order, a gradient
    added twice.
    """
    base = run(pool, world, **changes)
    # A stage of a V has one layer.
    some = [] if "parallel__stages_per_rank" in changes else [("full", 1)]
    for policy, layers in [("selective", None), ("full", None), *some]:
        found = run(
            pool, world, kernels__recompute=policy, kernels__recompute_layers=layers, **changes
        )
        assert found[0] == base[0], (policy, layers)
        assert found[1] == base[1], (policy, layers)
        for kind in (2, 3):
            for name, value in base[kind].items():
                assert np.array_equal(found[kind][name], value), (policy, layers, name)


def documents_job(launch: Launch, configs: list[Any]) -> list[tuple[float, float]]:
    found = []
    for config in configs:
        engine = engine_of(config, grid_of(launch, config))
        microbatches = microbatches_of(config, engine.grid, 1)
        batch = [MicroBatch(m.tokens, (m.tokens % 5).cumsum(1) // 20) for m in microbatches]
        for _ in range(STEPS):
            result = engine.train_step(batch, 1e-3)
            found.append((result.loss, result.grad_norm))
    return found


def test_document_borders_are_seen_again(pool: GlooPool) -> None:
    """Catches a mask that does not reach what is computed again: it would attend across borders
    there.
    """
    none, *others = [
        pool.run(
            1,
            documents_job,
            [tiny_config(**SMALL, kernels__recompute=policy, data__cross_documents="block")],
        )
        for policy in POLICIES
    ]
    assert others == [none, none]
