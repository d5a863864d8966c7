"""Tensor-parallel linear layers.

Sequence parallelism is a field of the axis, not a subclass.

    ColumnLinear  y = x [W_1 W_2 ... W_tp]: each rank holds some outputs
    RowLinear     y = sum_r x_r W_r:        each rank holds some inputs

- Several global tensors may share one column-parallel product.
- ColumnLinear as the head holds ceil(vocabulary/tp) rows. Rows past the vocabulary are padding.
- The layer's `matmul` (a `CollectiveMatmul`) decides what crosses ranks, and when.
- Each layer is one autograd function. Autograd sees only x and its gradient; the weight gradient
  goes to its accumulator, behind a transfer or at a later time.
- What it computes are two methods of the layer, on rows and outside of autograd. A transformer
  layer that is one autograd function calls them itself (`k2train.model.layer_function`).
- There are no biases in this architecture, so there are none here.

Alternatives considered:
- A collective and a product as two functions: autograd then leaves nothing to hide the one behind
  the other.

Source: Shoeybi et al. 2019 (arXiv:1909.08053) section 3.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2train.parallel.collective_matmul import Product, choose_collective_matmul
from k2train.parallel.collectives import Pending
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.parallel.grid import Axis
from k2train.parallel.shard import ParamSlice, Sharded, even_slice, first_rows


def _flat(x: Tensor) -> Tensor:
    """Reshape [s, b, h] -> [s * b, h]; a view, unless `x` has gaps."""
    return x.flatten(0, 1)


def _unflat(rows: Tensor, shape: torch.Size) -> Tensor:
    """Reshape [s * b, m] -> [s, b, m], with b of `shape` [..., b, ...]."""
    return rows.view(rows.shape[0] // shape[1], shape[1], rows.shape[1])


def _submit_weight_gradient(
    layer: "ColumnLinear | RowLinear", used: Tensor, dy: Tensor, gather: Callable[[], Tensor]
) -> Tensor | None:
    """Submit the weight gradient dy^T x to the stage.

    dy [n, rows]; `gather` returns x [n, columns]. `used` are the rows of the weight that took part.
    Without an accumulator, returns the gradient for autograd.
    """
    weight, product = layer.weight, layer.matmul.product

    accumulator = accumulator_of(weight)
    if accumulator is None:
        gradient = dy.t() @ gather()
        return (
            gradient
            if used.shape == weight.shape
            else F.pad(gradient, (0, 0, 0, weight.shape[0] - used.shape[0]))
        )

    def work() -> None:
        product.add_weight_gradient(first_rows(accumulator.total, used.shape[0]), dy, gather())
        accumulator.complete()

    layer.weight_grad_store.submit(work)
    return None


def _require_weight(layer: "ColumnLinear | RowLinear", used: Tensor) -> None:
    """Raise RuntimeError unless the layer still holds the weight that its forward used.

    Its backward reads the layer's. `torch.func.functional_call` has put the old one back by then.
    """
    # A parametrized weight is a new tensor each time, and no parameter.
    if layer._parameters.get("weight", used) is not used:
        raise RuntimeError("the weight of a layer was replaced between its forward and backward")


class _Column(torch.autograd.Function):
    """x [s(/tp), b, in] -> [s, b, out/tp]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: "ColumnLinear") -> Tensor:
        ctx.layer, ctx.weight, ctx.shape = layer, weight, x.shape
        # Detached: a view would keep the history of x until the weight gradient is done.
        y, kept = layer.forward_rows(_flat(x.detach()))
        ctx.save_for_backward(kept)
        return _unflat(y, x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        _require_weight(ctx.layer, ctx.weight)
        wants = ctx.needs_input_grad[:2]
        dx, gradient = ctx.layer.backward_rows(_flat(dy), *ctx.saved_tensors, *wants)
        return None if dx is None else dx.view(ctx.shape), gradient, None


class _Row(torch.autograd.Function):
    """x [s, b, in/tp] -> [s(/tp), b, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: "RowLinear") -> Tensor:
        ctx.layer, ctx.weight, ctx.shape = layer, weight, x.shape
        flat = _flat(x.detach())
        ctx.save_for_backward(flat)
        return _unflat(layer.forward_rows(flat), x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        _require_weight(ctx.layer, ctx.weight)
        wants = ctx.needs_input_grad[:2]
        dx, gradient = ctx.layer.backward_rows(_flat(dy), *ctx.saved_tensors, *wants)
        return None if dx is None else dx.view(ctx.shape), gradient, None


class ColumnLinear(Sharded):
    """Column-parallel linear layer: [s(/tp), b, in] -> [s, b, out/tp], /tp with `tp.sequence`.

    `outputs` maps global tensor names to their rows. Their local shards follow one another in one
    product. With `pad` a size that tp does not divide is rounded up, and the product leaves the
    padding out.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Mapping[str, int],
        tp: Axis,
        init_std: float,
        pad: bool = False,
        product: Product | None = None,
    ):
        super().__init__()
        self.tp, self.outputs, self.in_features = tp, dict(outputs), in_features

        slices, row, padded = [], 0, 0
        for name, size in outputs.items():
            assert pad or size % tp.size == 0, f"{name}: {size} rows do not divide over {tp}"
            start, stop = even_slice(size, tp.size, tp.rank)
            slices.append(
                ParamSlice(name, (size, in_features), 0, start, stop, row, init_std, decay=True)
            )
            row += stop - start
            padded += -(-size // tp.size)

        assert not pad or len(slices) == 1, "padding needs exactly one slice"

        # Padding rows follow the real ones, so that the product can leave them out.
        self.rows = row
        self.weight = nn.Parameter(torch.empty(padded, in_features))
        self.slices = {"weight": tuple(slices)}

        self.matmul = choose_collective_matmul(tp, product)
        self.matmul.product.check(" + ".join(outputs), self.rows, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return _Column.apply(x, self.weight, self)

    def forward_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply rows x [n(/tp), in], outside of autograd: y [n, out/tp], and what to keep.

        Collective. Kept is the gathered x, or x to be gathered again.
        """
        used = first_rows(self.weight, self.rows)
        whole, y = self.matmul.gather_multiply(x, used.t(), gradient=False)
        return y, x if self.matmul.regather else whole

    def backward_rows(
        self, dy: Tensor, kept: Tensor, wants_x: bool = True, wants_weight: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and, without an accumulator, of the weight. Collective."""
        matmul, used = self.matmul, first_rows(self.weight, self.rows)

        # Start the second gather first: it then runs behind the product for dx.
        x = Pending(kept)
        if matmul.regather and wants_weight and not self.weight_grad_store.is_deferring:
            x = matmul.gather(kept)

        dx = matmul.multiply_scatter(dy, used, gradient=True) if wants_x else None

        gradient = None
        if wants_weight:
            # A deferred weight gradient gathers x when it runs, not before.
            regathers_later = matmul.regather and self.weight_grad_store.is_deferring
            gradient = _submit_weight_gradient(
                self, used, dy, (lambda: matmul.gather(kept).wait()) if regathers_later else x.wait
            )

        return None if dx is None else dx.wait(), gradient

    def extra_repr(self) -> str:
        whole = "+".join(str(n) for n in self.outputs.values())
        return (
            f"in={self.in_features}, out={self.rows} of {whole}, "
            f"{self.tp}, sequence={self.tp.sequence}"
        )


class RowLinear(Sharded):
    """Row-parallel linear layer: [s, b, in/tp] -> [s(/tp), b, out], /tp with `tp.sequence`."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        tp: Axis,
        init_std: float,
        product: Product | None = None,
    ):
        super().__init__()
        assert in_features % tp.size == 0, f"{name}: {in_features} columns do not divide over {tp}"
        self.tp, self.in_features, self.out_features = tp, in_features, out_features
        start, stop = even_slice(in_features, tp.size, tp.rank)
        self.weight = nn.Parameter(torch.empty(out_features, stop - start))
        self.slices = {
            "weight": (
                ParamSlice(
                    name, (out_features, in_features), 1, start, stop, 0, init_std, decay=True
                ),
            )
        }
        self.matmul = choose_collective_matmul(tp, product)
        self.matmul.product.check(name, out_features, stop - start)

    def forward(self, x: Tensor) -> Tensor:
        return _Row.apply(x, self.weight, self)

    def forward_rows(self, x: Tensor) -> Tensor:
        """Multiply rows x [n, in/tp], outside of autograd: [n(/tp), out]. Collective."""
        return self.matmul.multiply_scatter(x, self.weight.t(), gradient=False).wait()

    def backward_rows(
        self, dy: Tensor, x: Tensor, wants_x: bool = True, wants_weight: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and, without an accumulator, of the weight. Collective.

        The gathered gradient is kept until the weight gradient is done.
        """
        weight = self.weight
        if wants_x:
            whole, dx = self.matmul.gather_multiply(dy, weight, gradient=True)
        else:
            whole, dx = self.matmul.gather(dy).wait(), None
        gradient = _submit_weight_gradient(self, weight, whole, lambda: x) if wants_weight else None
        return dx, gradient

    def extra_repr(self) -> str:
        return (
            f"in={self.weight.shape[1]} of {self.in_features}, "
            f"out={self.out_features}, {self.tp}, sequence={self.tp.sequence}"
        )
