"""Products by the libraries of a choice: which shape goes where, and how that is named."""

import pytest
import torch
from torch import Tensor

from k2train.model.kernels.product_choice import (
    FORWARD,
    INPUT,
    WEIGHT,
    Choice,
    ChosenProduct,
    ProductShape,
    available_libraries,
    read_shape,
)
from k2train.parallel.collective_matmul import Product

ONE, OTHER = ProductShape(FORWARD, 6, 4, 3), ProductShape(WEIGHT, 6, 4, 3)


class Noted(Product):
    """Products that note their library."""

    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls, self.writes_out = name, calls, name != "onednn"

    def multiply(
        self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
    ) -> Tensor:
        self.calls.append(self.name)
        return super().multiply(a, matrix, gradient, out)

    def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
        self.calls.append(self.name)
        super().add_weight_gradient(into, dy, x)

    def gradient_sums(self, device: torch.device, dtype: torch.dtype) -> str:
        return f"by {self.name}"


def choice(products: dict[ProductShape, str], default: str = "torch") -> Choice:
    return Choice("a processor", 1, default, products)


@pytest.mark.parametrize("kind", [FORWARD, INPUT, WEIGHT])
def test_a_shape_goes_to_its_library_and_no_other(kind: str) -> None:
    """Catches kinds or sizes that are mixed up: n, k and m are read off other factors in each."""
    calls: list[str] = []
    found = ProductShape(kind, 6, 4, 3)
    product = ChosenProduct(choice({found: "openblas"}), lambda name: Noted(name, calls))
    x, dy, weight = torch.ones(6, 4), torch.ones(6, 3), torch.ones(3, 4)

    product.multiply(x, weight.t(), gradient=False)
    product.multiply(dy, weight, gradient=True)
    product.add_weight_gradient(torch.zeros(3, 4), dy, x)
    assert calls == ["openblas" if one == kind else "torch" for one in (FORWARD, INPUT, WEIGHT)]

    calls.clear()
    product.multiply(x[:5], weight.t(), gradient=False)
    product.multiply(dy[:5], weight, gradient=True)
    product.add_weight_gradient(torch.zeros(3, 4), dy[:5], x[:5])
    assert set(calls) == {"torch"}, "a shape that nobody measured is the default's"


def test_the_line_tells_tables_apart() -> None:
    """Catches two tables with the same counts that pass for one setting."""
    assert str(choice({ONE: "torch", OTHER: "torch"})) == ""
    told = {str(choice({ONE: "openblas", OTHER: "torch"})), str(choice({OTHER: "openblas"}))}
    told.add(str(choice({ONE: "torch", OTHER: "openblas"})))
    assert len(told) == 3 and all(one.startswith("openblas for 1 of ") for one in told)
    mixed = str(choice({ONE: "torch", OTHER: "openblas"}, "onednn"))
    assert mixed.startswith("torch for 1 and openblas for 1 of 2 products (")
    assert ", " not in mixed, "parts of the kernels line are compared one by one"
    assert str(choice({ONE: "openblas", OTHER: "onednn"})) == str(
        choice({OTHER: "onednn", ONE: "openblas"})
    )


def test_memory_and_sums_are_those_of_the_libraries_in_use() -> None:
    """Catches a line that says `in place` for sums that are added in two steps."""
    made = lambda name: Noted(name, [])  # noqa: E731
    mixed = ChosenProduct(choice({ONE: "openblas", OTHER: "onednn"}), made)
    assert not mixed.writes_out
    assert mixed.gradient_sums(torch.device("cpu"), torch.float32) == "by onednn"
    plain = ChosenProduct(choice({ONE: "openblas"}), made)
    assert plain.writes_out
    assert plain.gradient_sums(torch.device("cpu"), torch.float32) == "by torch"


def test_shapes_are_read_as_they_are_written() -> None:
    """Catches a record that a later start does not find."""
    for shape in (ONE, OTHER, ProductShape(INPUT, 1024, 1, 99999)):
        assert read_shape(str(shape)) == shape
    for text in ("", "forward", "forward 1x2", "sideways 1x2x3", "forward 1x2x3x4", "input -1x2x3"):
        assert read_shape(text) is None


def test_all_three_libraries_are_here() -> None:
    """Catches a test of choices that has nothing to choose from."""
    assert available_libraries() == ["torch", "onednn", "openblas"]
