"""Tensor-parallel linear layers and embedding.

Sequence parallelism is a field of the axis, not a subclass.

    ColumnLinear  y = x [W_1 W_2 ... W_tp]: each rank holds some outputs
    RowLinear     y = sum_r x_r W_r:        each rank holds some inputs

- Several global tensors may share one column-parallel product.
- VocabEmbedding, and ColumnLinear as the head, hold ceil(vocabulary/tp) rows. Rows past the
  vocabulary are padding.
- The layer's `matmul` (a `CollectiveMatmul`) decides what crosses ranks, and when.
- Each layer is one autograd function. Autograd sees only x and its gradient; the weight gradient
  goes to its accumulator, behind a transfer or at a later time.
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

from k2train.errors import DataError
from k2train.parallel.collective_matmul import Product, choose_collective_matmul
from k2train.parallel.collectives import Pending, leave_parallel
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.parallel.grid import Axis
from k2train.parallel.shard import ParamSlice, Sharded, even_slice


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
        product.add_weight_gradient(accumulator.total.narrow(0, 0, used.shape[0]), dy, gather())
        accumulator.complete()

    layer.weight_grad_store.submit(work)
    return None


class _Column(torch.autograd.Function):
    """x [s(/tp), b, in] -> [s, b, out/tp]. Backward uses the gathered x, kept or gathered again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: "ColumnLinear") -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        matmul, used = layer.matmul, weight.narrow(0, 0, layer.rows)
        # Detached: a view would keep the history of x until the weight gradient is done.
        flat = _flat(x.detach())
        whole, y = matmul.gather_multiply(flat, used.t(), gradient=False)
        ctx.save_for_backward(flat if matmul.regather else whole)
        return _unflat(y, x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        layer, (kept,) = ctx.layer, ctx.saved_tensors
        matmul, used, dy = layer.matmul, layer.weight.narrow(0, 0, layer.rows), _flat(dy)

        wants_x, wants_weight, _ = ctx.needs_input_grad

        # Start the second gather first: it then runs behind the product for dx.
        x = Pending(kept)
        if matmul.regather and wants_weight and not layer.weight_grad_store.is_deferring:
            x = matmul.gather(kept)

        dx = matmul.multiply_scatter(dy, used, gradient=True) if wants_x else None

        gradient = None
        if wants_weight:
            # A deferred weight gradient gathers x when it runs, not before.
            regathers_later = matmul.regather and layer.weight_grad_store.is_deferring
            gradient = _submit_weight_gradient(
                layer, used, dy, (lambda: matmul.gather(kept).wait()) if regathers_later else x.wait
            )

        return None if dx is None else dx.wait().view(ctx.shape), gradient, None


class _Row(torch.autograd.Function):
    """x [s, b, in/tp] -> [s(/tp), b, out].

    The gathered gradient is kept until the weight gradient is done.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: "RowLinear") -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        flat = _flat(x.detach())
        ctx.save_for_backward(flat)
        y = layer.matmul.multiply_scatter(flat, weight.t(), gradient=False).wait()
        return _unflat(y, x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        layer, (x,) = ctx.layer, ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        if wants_x:
            whole, dx = layer.matmul.gather_multiply(_flat(dy), layer.weight, gradient=True)
        else:
            whole, dx = layer.matmul.gather(_flat(dy)).wait(), None
        gradient = (
            _submit_weight_gradient(layer, layer.weight, whole, lambda: x) if wants_weight else None
        )
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

    def extra_repr(self) -> str:
        return (
            f"in={self.weight.shape[1]} of {self.in_features}, "
            f"out={self.out_features}, {self.tp}, sequence={self.tp.sequence}"
        )


class _Lookup(torch.autograd.Function):
    """Token ids [s, b] -> [s, b, h]: rows of the weight held by this rank, zeros for all others.

    An id held elsewhere is looked up at its remainder, and its result is masked. If all of them
    used row 0, the backward pass would add most of a batch to one row, serially.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, layer: "VocabEmbedding") -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(ids)
        local, mine = layer.local(ids)
        x = F.embedding(local, weight)
        return x if mine is None else x.mul_(mine.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None]:
        layer, (ids,) = ctx.layer, ctx.saved_tensors
        accumulator = accumulator_of(layer.weight)
        if accumulator is None:
            gradient = torch.zeros_like(layer.weight)
            layer.add_rows(gradient, ids, dy)
            return None, gradient, None

        def work() -> None:
            layer.add_rows(accumulator.total, ids, dy)
            accumulator.complete()

        layer.weight_grad_store.submit(work)
        return None, None, None


class VocabEmbedding(Sharded):
    """Vocabulary-parallel embedding: token ids [b, s] -> [s(/tp), b, h], /tp with `tp.sequence`.

    Each rank looks up the ids it holds. Raises DataError on an id outside the vocabulary. That is
    on a CPU only: a check on an accelerator would stall its queue, so there the result is NaN,
    which the finite check refuses. A plain masked lookup would silently return zeros.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        tp: Axis,
        init_std: float,
    ):
        super().__init__()
        self.tp, self.vocab_size, self.hidden_size = tp, vocab_size, hidden_size
        self.start, self.stop = even_slice(vocab_size, tp.size, tp.rank)
        self.weight = nn.Parameter(torch.empty(-(-vocab_size // tp.size), hidden_size))
        self.slices = {
            "weight": (
                ParamSlice(
                    name,
                    (vocab_size, hidden_size),
                    0,
                    self.start,
                    self.stop,
                    0,
                    init_std,
                    decay=True,
                ),
            )
        }

    def forward(self, tokens: Tensor) -> Tensor:
        ids = tokens.t()
        bad = (ids < 0) | (ids >= self.vocab_size)
        if ids.device.type == "cpu" and bool(bad.any()):
            position, row = (int(i) for i in bad.nonzero()[0])
            raise DataError(
                f"token id {int(ids[position, row])} at row {row}, position {position} of a "
                f"micro-batch is outside the vocabulary (model.vocab_size is {self.vocab_size})"
            )

        x = _Lookup.apply(ids, self.weight, self)
        if ids.device.type != "cpu":
            # No check on an accelerator: NaN reaches the finite check of the step.
            x = x.masked_fill(bad.unsqueeze(-1), float("nan"))
        return leave_parallel(x, self.tp)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map ids [s, b] to rows of the local weight, with a mask of ids held here (None: all)."""
        if self.tp.size == 1:
            return ids.clamp(0, self.vocab_size - 1), None
        return (ids - self.start).remainder(self.weight.shape[0]), (ids >= self.start) & (
            ids < self.stop
        )

    def add_rows(self, into: Tensor, ids: Tensor, dy: Tensor) -> None:
        """Add dy [s, b, h] to rows of `into` [v/tp, h] named by ids [s, b], in order of positions.

        Deterministic: on a CPU index_add_ goes row by row. On an accelerator it would add in any
        order, but index_put_ sorts first.
        """
        local, mine = self.local(ids)
        rows, dy = local.reshape(-1), _flat(dy)
        if mine is not None:
            dy = dy * mine.reshape(-1, 1)
        if into.device.type == "cpu":
            into.index_add_(0, rows, dy.to(into.dtype))
        else:
            into.index_put_((rows,), dy.to(into.dtype), accumulate=True)

    def extra_repr(self) -> str:
        return (
            f"ids={self.start}..{self.stop - 1} of {self.vocab_size}, hidden={self.hidden_size}, "
            f"{self.tp}, sequence={self.tp.sequence}"
        )
