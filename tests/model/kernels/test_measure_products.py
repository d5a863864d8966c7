"""Measurement of products: what is measured, in which order, and what follows from it."""

import itertools

import pytest

from k2train.model.kernels import measure_products as module
from k2train.model.kernels.measure_products import (
    LEAST_ROUNDS,
    MOST_ROUNDS,
    choose_library,
    measure_products,
    measured_shape,
    rates_of,
)
from k2train.model.kernels.product_choice import FORWARD, INPUT, KINDS, WEIGHT, ProductShape
from k2train.parallel.collective_matmul import Product
from tests.model.kernels.test_product_choice import Noted


@pytest.mark.parametrize(
    ("seconds", "default", "chosen"),
    [
        ({"torch": [1.0, 1.0], "openblas": [0.5, 0.5]}, "torch", "openblas"),
        ({"torch": [1.0, 1.0], "openblas": [0.95, 0.95]}, "torch", "torch"),
        ({"torch": [1.0, 1.0], "openblas": [0.95, 0.95]}, "openblas", "openblas"),
        # Once lucky, or slow in the other's only good round.
        ({"torch": [1.0, 1.0, 1.0], "openblas": [0.5, 1.0, 1.0]}, "torch", "torch"),
        ({"torch": [2.0, 2.0, 0.5], "openblas": [1.0, 1.0, 0.5]}, "torch", "torch"),
        # Among others the later one must be faster by as much.
        ({"torch": [1.0], "onednn": [0.5], "openblas": [0.48]}, "torch", "onednn"),
        ({"torch": [1.0], "onednn": [0.5], "openblas": [0.4]}, "torch", "openblas"),
        ({"torch": [0.5], "onednn": [1.0]}, "onednn", "torch"),
    ],
)
def test_another_library_must_be_faster_by_a_tenth(
    seconds: dict[str, list[float]], default: str, chosen: str
) -> None:
    """Catches a choice by noise, which two fresh starts would make differently."""
    assert choose_library(seconds, default) == chosen


def test_libraries_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one library after the other, where a slow second hits one of them alone, and a first
    call with its preparations that counts.
    """
    calls: list[str] = []
    monkeypatch.setattr(module, "product_of", lambda name: Noted(name, calls))
    shapes, clock = [ProductShape(kind, 8, 4, 2) for kind in KINDS], itertools.count(0.0, 1.0)
    found = measure_products(shapes, ("torch", "onednn"), 0.0, lambda: next(clock))

    assert len(calls) == 2 * 3 * (1 + LEAST_ROUNDS)
    assert calls[:6] == ["torch", "onednn"] * 3 and calls[6:12] == ["onednn", "torch"] * 3
    assert all(len(times) == LEAST_ROUNDS for one in found.values() for times in one.values())
    assert all(times == [1.0] * LEAST_ROUNDS for one in found.values() for times in one.values())

    calls.clear()
    measure_products(shapes[:1], ("torch",), 1e9, lambda: next(clock))
    assert len(calls) == 1 + MOST_ROUNDS, "a small work ends"


@pytest.mark.parametrize("kind", KINDS)
def test_the_products_are_those_of_the_shape(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kind that is measured as another one, and factors of other sizes."""
    found: list[ProductShape] = []

    class Seen(Product):
        def multiply(self, a, matrix, gradient, out=None):  # type: ignore[no-untyped-def]
            (n, inner), outer = a.shape, matrix.shape[1]
            assert matrix.is_contiguous() == gradient, "a forward product's matrix is transposed"
            sizes = (INPUT, n, outer, inner) if gradient else (FORWARD, n, inner, outer)
            found.append(ProductShape(*sizes))
            return super().multiply(a, matrix, gradient, out)

        def add_weight_gradient(self, into, dy, x):  # type: ignore[no-untyped-def]
            found.append(ProductShape(WEIGHT, x.shape[0], x.shape[1], dy.shape[1]))
            super().add_weight_gradient(into, dy, x)

    monkeypatch.setattr(module, "product_of", lambda name: Seen())
    shape = ProductShape(kind, 7, 5, 3)
    measure_products([shape], ("torch",), 0.0)
    assert set(found) == {shape}


def test_large_products_are_measured_with_fewer_rows() -> None:
    """Catches a start that takes minutes, and rates that count rows nobody multiplied."""
    large, small = ProductShape(FORWARD, 8192, 4096, 11008), ProductShape(INPUT, 1024, 64, 64)
    assert measured_shape(large) == large._replace(n=64) and measured_shape(small) == small
    assert rates_of({large: {"torch": [2.0, 1.0]}})[large] == {"torch": 2 * 64 * 4096 * 11008 / 1e9}
