"""A matrix product and the collective that belongs to it: the one place that says when a transfer begins and who waits.

Two operations, each the other's backward; rows are [s * b] flattened, so a part of the sequence is a block of rows:

                       gather_multiply                    multiply_scatter
    one rank           x M                                x M
    replicated         x M                                all-reduce of x M
    split sequence     all-gather of x, times M           reduce-scatter of x M

A column-parallel layer is gather_multiply forward and multiply_scatter backward, a row-parallel one the other way round.
Waiting at once, going on meanwhile (`overlap`) and fusing both (`symmetric`) differ here only. With overlap the
product of the rank's own rows is made while the others' are on their way, and what multiply_scatter returns is waited for
by the caller, who has a weight gradient to compute meanwhile. Refused: cutting every product into `tp` pieces sent one by
one (many small transfers; over symmetric memory torch does that with copies that cost no kernels).

Source of the overlap: Korthikanti et al. 2022 (arXiv:2205.05198), and Megatron-LM's linear layers.
"""

import torch
from torch import Tensor

from k2train.parallel.collectives import (
    Pending,
    all_gather_start,
    all_reduce_start,
    reduce_scatter_start,
)
from k2train.parallel.grad_accumulation import add_product
from k2train.parallel.grid import Axis
from k2train.parallel.symmetric_memory import (
    gather_multiply,
    multiply_scatter,
    require_symmetric_memory,
)


class Product:
    """How matrices are multiplied: by torch, in the dtype of the factors. A subclass may round them first."""

    writes_out = True
    """Whether `out` saves memory; where it does not, a result is copied there."""
    exact = True
    """Whether it is fit for the head, whose logits must not be rounded further."""

    def multiply(
        self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
    ) -> Tensor:
        """a [n, k] times matrix [k, m], a weight or its transpose -> [n, m], in `out` where given.

        `gradient`: `a` is one, and wants range more than digits.
        """
        return torch.mm(a, matrix, out=out)

    def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
        """into [rows, columns], fp32, += dy^T x: dy [n, rows], x [n, columns]."""
        add_product(into, dy, x)

    def check(self, name: str, rows: int, columns: int) -> None:
        """Raise ConfigError where a weight of this local shape cannot be multiplied so."""


class CollectiveMatmul:
    """One rank, and what the others share: nothing is sent."""

    def __init__(self, axis: Axis, product: Product):
        self.axis, self.product = axis, product
        self.regather = False
        """Whether the part of x that a rank put in is kept for the backward pass, and not all of it."""

    def gather(self, x: Tensor) -> Pending:
        """x [n(/tp), k] -> [n, k], in the order the ranks call it."""
        return Pending(x)

    def gather_multiply(self, x: Tensor, matrix: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """x [n(/tp), k], matrix [k, m] -> all of x [n, k], and its product [n, m]."""
        return x, self.product.multiply(x, matrix, gradient)

    def multiply_scatter(self, x: Tensor, matrix: Tensor, gradient: bool) -> Pending:
        """x [n, k], matrix [k, m] -> this rank's rows [n(/tp), m] of the products' sum over ranks, on their way."""
        return Pending(self.product.multiply(x, matrix, gradient))


class Replicated(CollectiveMatmul):
    """Every rank holds all rows: sums are all-reduced."""

    def multiply_scatter(self, x: Tensor, matrix: Tensor, gradient: bool) -> Pending:
        return all_reduce_start(
            self.product.multiply(x, matrix, gradient), self.axis, wait=not self.axis.overlap
        )


class Split(CollectiveMatmul):
    """Every rank holds its rows (sequence parallelism): gathered before a product, reduce-scattered after it."""

    def __init__(self, axis: Axis, product: Product):
        super().__init__(axis, product)
        self.regather = axis.regather

    def gather(self, x: Tensor) -> Pending:
        return all_gather_start(x, self.axis, wait=not self.axis.overlap)

    def gather_multiply(self, x: Tensor, matrix: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        gathering = self.gather(x)
        if not self.axis.overlap:
            whole = gathering.wait()
            return whole, self.product.multiply(whole, matrix, gradient)
        rows, first = x.shape[0], self.axis.rank * x.shape[0]
        y = x.new_empty(rows * self.axis.size, matrix.shape[1])
        self.product.multiply(x, matrix, gradient, y[first : first + rows])
        whole = gathering.wait()
        for others in (slice(0, first), slice(first + rows, None)):
            if whole[others].shape[0]:
                self.product.multiply(whole[others], matrix, gradient, y[others])
        return whole, y

    def multiply_scatter(self, x: Tensor, matrix: Tensor, gradient: bool) -> Pending:
        return reduce_scatter_start(
            self.product.multiply(x, matrix, gradient), self.axis, wait=not self.axis.overlap
        )


class Symmetric(Split):
    """The same with product and transfer in one: blocks are multiplied as they arrive, and sent as they are made."""

    def gather_multiply(self, x: Tensor, matrix: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        return gather_multiply(x.contiguous(), matrix, self.axis)

    def multiply_scatter(self, x: Tensor, matrix: Tensor, gradient: bool) -> Pending:
        return Pending(multiply_scatter(x, matrix, self.axis))


def choose_collective_matmul(
    axis: Axis, sequence: bool, product: Product | None
) -> CollectiveMatmul:
    """How the layers of one tensor-parallel axis exchange: decided once, when a layer is built.

    Raises ConfigError where `parallel.symmetric_memory` is asked for and cannot be had.
    """
    product = product or Product()
    if axis.size == 1:
        return CollectiveMatmul(axis, product)
    if axis.symmetric:
        require_symmetric_memory(axis.size, sequence, type(product) is Product)
        return Symmetric(axis, product)
    return (Split if sequence else Replicated)(axis, product)
