"""Column- and row-parallel products against plain ones, for every collective variant.

- Weight gradients run at once or deferred.
- Each case runs twice: with gloo's own transfers, and with transfers that only happen in `wait`. A
  result used before its wait is then NaN, and not by luck the right number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k2train.errors import ConfigError
from k2train.launch.environment import Launch
from k2train.parallel import collective_matmul, collectives
from k2train.parallel.collective_matmul import (
    CollectiveMatmul,
    Product,
    Replicated,
    Split,
    choose_collective_matmul,
)
from k2train.parallel.grad_accumulation import GradAccumulator, WeightGradStore, attach
from k2train.parallel.grid import SINGLE, Axis
from k2train.parallel.tensor_parallel import ColumnLinear, RowLinear
from tests.support.gloo_pool import GlooPool

SEQUENCE, ROWS, HIDDEN, INNER, MICROBATCHES = 8, 3, 16, 8, 3
WEIGHTS = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
CASES = tuple(product((False, True), repeat=4))
"""(sequence, overlap, regather, later)"""
COLLECTIVES = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce")


def drawn(name: str, *shape: int) -> Tensor:
    seed = sum(map(ord, name))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(column: Any, row: Any, x: Tensor) -> Tensor:
    gate, up = column(x).chunk(2, dim=-1)
    return row(torch.tanh(gate) * up)


def dense() -> dict[str, Any]:
    """The step on whole weights in float64."""
    weights = {name: drawn(name, *shape).requires_grad_() for name, shape in WEIGHTS.items()}
    column = torch.cat((weights["gate"], weights["up"]))
    xs = [drawn(f"x{m}", SEQUENCE, ROWS, HIDDEN).requires_grad_() for m in range(MICROBATCHES)]
    ys = [step(lambda x: x @ column.t(), lambda x: x @ weights["down"].t(), x) for x in xs]
    for m, y in enumerate(ys):
        y.backward(drawn(f"dy{m}", SEQUENCE, ROWS, HIDDEN), retain_graph=True)
    grads = {name: weight.grad for name, weight in weights.items()}
    return {"y": [y.detach() for y in ys], "dx": [x.grad for x in xs], "grads": grads}


class Counter:
    """Collectives begun, by kind; `late`: each happens when it is waited for, and its result is NaN
    until then.
    """

    def __init__(self, late: bool):
        self.late = late
        self.begun = dict.fromkeys(COLLECTIVES, 0)

    def wrap(self, kind: str, function: Any) -> Any:
        def call(out: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            self.begun[kind] += 1
            if not (self.late and async_op):
                return function(out, *args, async_op=async_op, **kwargs)
            given = out.clone()
            out.fill_(float("nan"))

            class Late:
                def wait(self) -> None:
                    out.copy_(given)
                    function(out, *args, async_op=False, **kwargs)

            return Late()

        return call

    @contextmanager
    def counting(self) -> Iterator[None]:
        originals = [(collectives, "_all_gather"), (collectives, "_reduce_scatter")]
        originals += [(dist, "all_to_all_single"), (dist, "all_reduce")]
        saved = [(module, name, getattr(module, name)) for module, name in originals]
        for kind, (module, name, function) in zip(COLLECTIVES, saved, strict=True):
            setattr(module, name, self.wrap(kind, function))
        try:
            yield
        finally:
            for module, name, function in saved:
                setattr(module, name, function)


def build(axis: Axis) -> tuple[ColumnLinear, RowLinear, dict[str, list[int]]]:
    """Both layers with this rank's part of the weights, accumulators attached; how often each
    accumulator was complete.
    """
    column = ColumnLinear(HIDDEN, {"gate": INNER, "up": INNER}, axis, 1.0)
    row = RowLinear("down", INNER, HIDDEN, axis, 1.0)
    arrived: dict[str, list[int]] = {"column": [], "row": []}
    work = WeightGradStore()

    for name, layer in (("column", column), ("row", row)):
        layer.weight_grad_store = work
        for param_slice in layer.slices["weight"]:
            whole = drawn(param_slice.name, *param_slice.global_shape).float()
            param_slice.of(layer.weight.data).copy_(
                whole.narrow(
                    param_slice.dim or 0, param_slice.start, param_slice.stop - param_slice.start
                )
            )

        attach(
            layer.weight,
            GradAccumulator(torch.zeros(layer.weight.shape), lambda n=name: arrived[n].append(1)),
        )

    return column, row, arrived


def case_job(launch: Launch, cases: Any, late: bool) -> list[dict[str, Any]]:
    return [
        run_case(Axis("tp", launch.world_size, launch.rank, dist.group.WORLD), *case, late)
        for case in cases
    ]


def run_case(
    axis: Axis, sequence: bool, overlap: bool, regather: bool, later: bool, late: bool
) -> dict[str, Any]:
    axis = replace(axis, sequence=sequence, overlap=overlap, regather=regather)
    column, row, arrived = build(axis)
    accumulators = {"column": column.weight.accumulator, "row": row.weight.accumulator}
    counter, found = Counter(late), {"y": [], "dx": [], "early": [], "arrived": []}

    def mine(x: Tensor) -> Tensor:
        return (x.chunk(axis.size)[axis.rank] if sequence else x).float().clone()

    with counter.counting():
        for m in range(MICROBATCHES):
            x = mine(drawn(f"x{m}", SEQUENCE, ROWS, HIDDEN)).requires_grad_()
            y = step(column, row, x)
            before = [accumulator.total.clone() for accumulator in accumulators.values()]

            if later:
                with column.weight_grad_store.deferring() as saved:
                    y.backward(mine(drawn(f"dy{m}", SEQUENCE, ROWS, HIDDEN)))
                unmoved = all(
                    torch.equal(a, accumulator.total)
                    for a, accumulator in zip(before, accumulators.values(), strict=True)
                )
                found["early"].append((unmoved, len(saved), len(arrived["column"])))
                for work in saved:
                    work()
            else:
                y.backward(mine(drawn(f"dy{m}", SEQUENCE, ROWS, HIDDEN)))

            found["y"].append(y.detach().numpy())
            found["dx"].append(x.grad.numpy())
            found["arrived"].append((len(arrived["column"]), len(arrived["row"])))

    found["autograd"] = [weight.grad is None for weight in (column.weight, row.weight)]
    found["begun"] = counter.begun
    found["grads"] = {
        param_slice.name: (
            param_slice.dim,
            param_slice.start,
            param_slice.of(accumulators[name].total).numpy(),
        )
        for name, layer in (("column", column), ("row", row))
        for param_slice in layer.slices["weight"]
    }

    return found


def close(found: Any, expected: Tensor) -> bool:
    wanted = expected.detach().numpy()
    return found.shape == wanted.shape and bool(
        np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    )


def expected_begun(tp: int, sequence: bool, regather: bool) -> dict[str, int]:
    begun = dict.fromkeys(COLLECTIVES, 0)
    if tp > 1 and sequence:
        # Forward and backward: one layer gathers and one scatters in each; the gathered input once
        # more where it is not kept.
        begun["all_gather"], begun["all_to_all"] = (2 + regather) * MICROBATCHES, 2 * MICROBATCHES
    elif tp > 1:
        begun["all_reduce"] = 2 * MICROBATCHES
    # Two ranks exchange everything by one kind of call.
    return (
        begun if tp != 2 else {**dict.fromkeys(COLLECTIVES, 0), "all_to_all": sum(begun.values())}
    )


@pytest.mark.parametrize("late", (False, True))
@pytest.mark.parametrize("tp", (1, 2, 4))
def test_every_variant_equals_the_plain_product(pool: GlooPool, tp: int, late: bool) -> None:
    """Catches a wait left out, rows in another rank's place, a gradient added twice, at the wrong
    time or not at all.
    """
    whole, parts = dense(), pool.run(tp, case_job, CASES, late)
    for index, (sequence, _, regather, later) in enumerate(CASES):
        ranks, say = [part[index] for part in parts], str(CASES[index])
        for key in ("y", "dx"):
            for m, wanted in enumerate(whole[key]):
                blocks = wanted.chunk(tp) if sequence else [wanted] * tp
                for rank, block in zip(ranks, blocks, strict=True):
                    assert close(rank[key][m], block), f"{key} of micro-batch {m}, {say}"

        for rank in ranks:
            for name, (dim, start, grad) in rank["grads"].items():
                assert close(grad, whole["grads"][name].narrow(dim, start, grad.shape[dim])), (
                    f"{name}, {say}"
                )

            assert rank["autograd"] == [True, True], f"a gradient went to autograd too, {say}"
            assert rank["arrived"] == [(m + 1, m + 1) for m in range(MICROBATCHES)], say
            assert rank["early"] == (
                [(True, 2, m) for m in range(MICROBATCHES)] if later else []
            ), say
            assert rank["begun"] == expected_begun(tp, sequence, regather), say


def test_when_changes_no_bit(pool: GlooPool) -> None:
    """Catches another order of sums where only the time of a transfer or of a weight gradient
    should differ.
    """
    parts = pool.run(2, case_job, CASES, False)
    for rank in parts:
        found = dict(zip(CASES, rank, strict=True))
        for sequence, overlap, regather, later in CASES:
            # With the sequence split, overlap cuts a product in two; everything else must leave the
            # same products.
            plain = found[sequence, overlap and sequence, False, False]
            this = found[sequence, overlap, regather, later]
            for key in ("y", "dx"):
                assert all(
                    np.array_equal(a, b) for a, b in zip(plain[key], this[key], strict=True)
                ), key
            for name, (_, _, grad) in plain["grads"].items():
                assert np.array_equal(grad, this["grads"][name][2]), name


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_a_product_copies_nothing() -> None:
    """Catches a hidden copy, and a weight gradient that is a tensor of its own before it is
    added.
    """
    column, row, _ = build(SINGLE["tp"])
    x = torch.randn(SEQUENCE, ROWS, HIDDEN, requires_grad=True)
    inner = torch.randn(SEQUENCE, ROWS, INNER, requires_grad=True)

    for layer, given in ((column, x), (row, inner)):
        with Operators() as operators:
            y = layer(given)
            y.backward(torch.ones_like(y))
        views = {
            "view",
            "t",
            "transpose",
            "detach",
            "narrow",
            "slice",
            "ones_like",
            "_unsafe_view",
            "alias",
            "reshape",
        }
        assert sorted(set(operators.names) - views) == ["addmm_", "mm"], operators.names
        assert operators.names.count("mm") == 2, operators.names


def test_padding_rows_take_no_gradient() -> None:
    """Catches a weight gradient that is written past the rows that took part."""
    head = ColumnLinear(HIDDEN, {"head": 5}, Axis("tp", 2, 1, None), 1.0, pad=True)
    head.matmul = CollectiveMatmul(head.tp, Product())
    torch.nn.init.ones_(head.weight)
    attach(head.weight, GradAccumulator(torch.zeros(3, HIDDEN)))
    head(torch.ones(2, 1, HIDDEN)).sum().backward()
    assert head.weight.accumulator.total.tolist() == [
        [2.0] * HIDDEN,
        [2.0] * HIDDEN,
        [0.0] * HIDDEN,
    ]


def test_a_frozen_weight_asks_for_nothing(pool: GlooPool) -> None:
    """Catches a weight gradient, and the gather for it, where none is wanted."""
    assert [sum(begun.values()) for begun in pool.run(2, frozen_job)] == [4, 4]


def frozen_job(launch: Launch) -> dict[str, int]:
    axis = Axis(
        "tp", launch.world_size, launch.rank, dist.group.WORLD, sequence=True, regather=True
    )
    column, row, _ = build(axis)
    column.weight.requires_grad_(False)
    row.weight.requires_grad_(False)
    counter = Counter(late=False)
    with counter.counting():
        step(column, row, torch.ones(4, 1, HIDDEN, requires_grad=True)).sum().backward()
    assert not column.weight.accumulator.total.any(), "a frozen weight got a gradient"
    return counter.begun


def test_the_choice_is_by_the_axis() -> None:
    """Catches a switch that chooses nothing, and symmetric memory that is missing and not
    refused.
    """
    one, two = replace(SINGLE["tp"], sequence=True), Axis("tp", 2, 0, None)
    split = replace(two, sequence=True)
    assert type(choose_collective_matmul(one, None)) is CollectiveMatmul
    assert type(choose_collective_matmul(two, None)) is Replicated
    assert type(choose_collective_matmul(split, None)) is Split
    assert choose_collective_matmul(replace(split, regather=True), None).regather
    with pytest.raises(ConfigError, match=r"parallel\.symmetric_memory needs"):
        choose_collective_matmul(replace(split, symmetric=True), None)


def test_a_product_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a layer that multiplies past the product it was given, or that does not ask it about
    its shape.
    """
    calls: list[Any] = []

    class Noting(Product):
        def multiply(
            self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
        ) -> Tensor:
            calls.append("gradient" if gradient else "value")
            return super().multiply(a, matrix, gradient, out)

        def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
            calls.append("weight")
            super().add_weight_gradient(into, dy, x)

        def check(self, name: str, rows: int, columns: int) -> None:
            calls.append((name, rows, columns))

    layers = [ColumnLinear(4, {"a": 6, "b": 2}, SINGLE["tp"], 1.0, product=Noting())]
    layers += [RowLinear("c", 8, 4, SINGLE["tp"], 1.0, product=Noting())]
    assert calls == [("a + b", 8, 4), ("c", 4, 8)]

    for layer, width in zip(layers, (4, 8), strict=True):
        calls.clear()
        torch.nn.init.ones_(layer.weight)
        attach(layer.weight, GradAccumulator(torch.zeros(layer.weight.shape)))
        layer(torch.ones(2, 1, width, requires_grad=True)).sum().backward()
        assert calls == ["value", "gradient", "weight"]

    assert collective_matmul.Product is Product
