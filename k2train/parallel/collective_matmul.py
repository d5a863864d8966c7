"""Matrix products with their tensor-parallel collective: when a transfer starts, and who waits.

Two operations, each the other's backward. Rows are [s * b] flattened, so a part of the sequence is
a block of rows:

                       gather_multiply                    multiply_scatter
    one rank           x M                                x M
    replicated         x M                                all-reduce of x M
    split sequence     all-gather of x, times M           reduce-scatter of x M

- A column-parallel layer is gather_multiply forward and multiply_scatter backward; a row-parallel
  layer the reverse.
- Blocking, overlapped (`overlap`) and fused (`symmetric`) transfers differ here only.
- With overlap a rank multiplies its own rows while the others' arrive. The caller of
  multiply_scatter waits for its result, and computes a weight gradient meanwhile.

Alternatives considered:
- Cutting every product into `tp` parts sent one by one: many small transfers. Over symmetric memory
  torch does that with copies that cost no kernels.

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
from k2train.parallel.grad_accumulation import add_product, gradient_sums
from k2train.parallel.grid import Axis
from k2train.parallel.symmetric_memory import (
    gather_multiply,
    multiply_scatter,
    require_symmetric_memory,
)


class Product:
    """Matrix multiplication by torch, in the dtype of the factors.

    Subclasses may round the factors first.
    """

    writes_out = True
    """Whether writing to `out` saves memory. If not, the result is copied there."""
    exact = True
    """Whether the product is exact enough for the head, whose logits must not be rounded further.
    """

    def multiply(
        self, a: Tensor, matrix: Tensor, gradient: bool, out: Tensor | None = None
    ) -> Tensor:
        """Multiply a [n, k] by `matrix` [k, m] -> [n, m], in `out` where given.

        `matrix` is a weight or its transpose. `gradient`: `a` is a gradient, which needs range more
        than precision.
        """
        return torch.mm(a, matrix, out=out)

    def add_weight_gradient(self, into: Tensor, dy: Tensor, x: Tensor) -> None:
        """Add dy^T x to `into` [rows, columns], fp32: dy [n, rows], x [n, columns]."""
        add_product(into, dy, x)

    def gradient_sums(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return how `add_weight_gradient` adds, with factors of `dtype`, for the kernels line."""
        return gradient_sums(device, dtype)

    def check(self, name: str, rows: int, columns: int) -> None:
        """Raise ConfigError when a weight of this local shape cannot be multiplied this way."""


class CollectiveMatmul:
    """Products of an axis with one rank, and the interface of the others. Sends nothing."""

    def __init__(self, axis: Axis, product: Product):
        self.axis, self.product = axis, product
        self.regather = False
        """Whether only this rank's part of x is kept for the backward pass."""

    def gather(self, x: Tensor) -> Pending:
        """Gather x [n(/tp), k] -> [n, k]. Collective: every rank must call in the same order."""
        return Pending(x)

    def gather_multiply(self, x: Tensor, matrix: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Gather x [n(/tp), k] -> [n, k] and multiply it by `matrix` [k, m]. Collective.

        Returns all rows of x and the product [n, m].
        """
        return x, self.product.multiply(x, matrix, gradient)

    def multiply_scatter(self, x: Tensor, matrix: Tensor, gradient: bool) -> Pending:
        """Multiply x [n, k] by `matrix` [k, m] and start the sum over ranks. Collective.

        The result is this rank's rows [n(/tp), m].
        """
        return Pending(self.product.multiply(x, matrix, gradient))


class Replicated(CollectiveMatmul):
    """Products where every rank holds all rows: sums are all-reduced."""

    def multiply_scatter(self, x: Tensor, matrix: Tensor, gradient: bool) -> Pending:
        return all_reduce_start(
            self.product.multiply(x, matrix, gradient), self.axis, wait=not self.axis.overlap
        )


class Split(CollectiveMatmul):
    """Products with sequence parallelism: all-gather before a product, reduce-scatter after it."""

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

        # Multiply our own rows while the others' are on their way.
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
    """Products fused with their transfer: blocks are multiplied on arrival and sent when done."""

    def gather_multiply(self, x: Tensor, matrix: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        return gather_multiply(x.contiguous(), matrix, self.axis)

    def multiply_scatter(self, x: Tensor, matrix: Tensor, gradient: bool) -> Pending:
        return Pending(multiply_scatter(x, matrix, self.axis))


def choose_collective_matmul(axis: Axis, product: Product | None) -> CollectiveMatmul:
    """Choose how the layers of one tensor-parallel axis communicate, once, when a layer is built.

    Raises ConfigError when `parallel.symmetric_memory` is on and not available.
    """
    product = product or Product()
    if axis.size == 1:
        return CollectiveMatmul(axis, product)
    if axis.symmetric:
        require_symmetric_memory(axis, type(product) is Product)
        return Symmetric(axis, product)
    return (Split if axis.sequence else Replicated)(axis, product)
