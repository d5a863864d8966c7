"""Products by several libraries: which one computes which shape, as it was measured and recorded.

- A product's shape is its kind and three sizes: `forward` is x W^T, `input` is dy W, `weight` is
  dy^T x, with x [n, k], dy [n, m] and W [m, k].
- A shape that is not in the table is computed by the default library, so no bit depends on a
  measurement that was not recorded.
- The kernels line names the libraries, the number of shapes and a hash of the table: two tables
  with the same counts are two settings.

Alternatives considered:
- One library for all products: the same library is fast for one kind and slow for another.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from k2train.model.kernels.onednn import OneDnnProduct
from k2train.model.kernels.onednn import available as has_onednn
from k2train.model.kernels.openblas import OpenBlasProduct, find_openblas
from k2train.parallel.collective_matmul import Product

FORWARD, INPUT, WEIGHT = "forward", "input", "weight"
KINDS = (FORWARD, INPUT, WEIGHT)
LIBRARIES = ("torch", "onednn", "openblas")
"""In the order in which they are preferred, behind the default."""
_TEXT = re.compile(rf"({'|'.join(KINDS)}) (\d{{1,9}})x(\d{{1,9}})x(\d{{1,9}})", re.ASCII)


class ProductShape(NamedTuple):
    """Kind and sizes of a product: n tokens, k inputs and m outputs of the matrix."""

    kind: str
    n: int
    k: int
    m: int

    def __str__(self) -> str:
        return f"{self.kind} {self.n}x{self.k}x{self.m}"

    @property
    def flops(self) -> int:
        """Floating-point operations of one product."""
        return 2 * self.n * self.k * self.m


def read_shape(text: str) -> ProductShape | None:
    """Return the shape that a record names, None for a text that is none."""
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    kind, *sizes = found.groups()
    return ProductShape(kind, *map(int, sizes))


@dataclass(frozen=True)
class Choice:
    """Library of every product of one layout, and where that was measured."""

    processor: str
    threads: int
    default: str
    products: Mapping[ProductShape, str]

    @property
    def others(self) -> dict[ProductShape, str]:
        """Products that another library than the default computes."""
        return {shape: name for shape, name in self.products.items() if name != self.default}

    @property
    def libraries(self) -> list[str]:
        """Libraries in use besides the default."""
        return [name for name in LIBRARIES if name in set(self.others.values())]

    def __str__(self) -> str:
        """Text for the kernels line: `openblas for 3 of 12 products (1f9a0c)`; "" for none."""
        if not (others := self.others):
            return ""
        counts = Counter(others.values())
        told = " and ".join(f"{name} for {counts[name]}" for name in self.libraries)
        table = json.dumps(sorted((str(shape), name) for shape, name in others.items()))
        digest = hashlib.sha256(table.encode()).hexdigest()[:6]
        return f"{told} of {len(self.products)} products ({digest})"


def available_libraries() -> list[str]:
    """Libraries that this process can multiply with."""
    there = {"torch": True, "onednn": has_onednn(), "openblas": find_openblas() is not None}
    return [name for name in LIBRARIES if there[name]]


def product_of(library: str) -> Product:
    """Return the fp32 products of one library, which is available."""
    if library == "openblas":
        found = find_openblas()
        assert found is not None, "numpy has an OpenBLAS"
        return OpenBlasProduct(found)
    return OneDnnProduct() if library == "onednn" else Product()


class ChosenProduct(Product):
    """Each product by the library that a choice names for its shape."""

    def __init__(self, choice: Choice, product: Callable[[str], Product] = product_of):
        used = {name: product(name) for name in (choice.default, *choice.libraries)}
        self._default = used[choice.default]
        self._by_shape = {shape: used[name] for shape, name in choice.others.items()}
        self._sums = [
            used[name] for shape, name in choice.products.items() if shape.kind == WEIGHT
        ] or [self._default]
        self.writes_out = all(one.writes_out for one in used.values())

    def multiply(
        self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
    ) -> Tensor:
        (n, rows), columns = a.shape, matrix.shape[1]
        shape = (
            ProductShape(INPUT, n, columns, rows)
            if gradient
            else ProductShape(FORWARD, n, rows, columns)
        )
        return self._by_shape.get(shape, self._default).multiply(a, matrix, gradient, out)

    def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
        shape = ProductShape(WEIGHT, x.shape[0], x.shape[1], dy.shape[1])
        self._by_shape.get(shape, self._default).add_weight_gradient(into, dy, x)

    def gradient_sums(self, device: torch.device, dtype: torch.dtype) -> str:
        told = dict.fromkeys(one.gradient_sums(device, dtype) for one in self._sums)
        return " and ".join(told)
