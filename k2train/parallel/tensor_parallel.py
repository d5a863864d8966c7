"""Tensor-parallel linear layers and embedding. Sequence parallelism is an argument, not a subclass.

    ColumnLinear  y = x [W_1 W_2 ... W_tp]: each rank holds some outputs; several global tensors may share one product
    RowLinear     y = sum_r x_r W_r:        each rank holds some inputs
    VocabEmbedding, and ColumnLinear as the head, hold ceil(vocabulary/tp) rows each; rows past the vocabulary are padding

What crosses ranks, and when, is the layer's `matmul`. Each layer is one autograd function, so that the weight gradient
can go straight to its accumulator, behind a transfer or at a later time: autograd sees only x and its gradient. Refused: a
collective and a product as two functions, between which autograd leaves nothing to hide the one behind the other.

Source: Shoeybi et al. 2019 (arXiv:1909.08053) section 3. There are no biases in this architecture, so there are none here.
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
    """[s, b, h] -> [s * b, h]; a view, unless `x` has gaps."""
    return x.flatten(0, 1)


def _unflat(rows: Tensor, shape: torch.Size) -> Tensor:
    """[s * b, m] -> [s, b, m], with b of `shape` [..., b, ...]."""
    return rows.view(rows.shape[0] // shape[1], shape[1], rows.shape[1])


def _submit_weight_gradient(
    layer: "ColumnLinear | RowLinear", used: Tensor, dy: Tensor, gather: Callable[[], Tensor]
) -> Tensor | None:
    """Give the stage the weight gradient dy^T x to do: dy [n, rows], `gather` gives x [n, columns] when it is done.

    `used` are the rows of the weight that took part. A weight without a sink gets its gradient returned, for autograd.
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
    """x [s(/tp), b, in] -> [s, b, out/tp]. What a backward pass needs of the gathered x is kept, or gathered again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: "ColumnLinear") -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        matmul, used = layer.matmul, weight.narrow(0, 0, layer.rows)
        # Detached: a view holds the history of x, and with it the stage's input, while its weight gradient waits.
        flat = _flat(x.detach())
        whole, y = matmul.gather_multiply(flat, used.t(), gradient=False)
        ctx.save_for_backward(flat if matmul.regather else whole)
        return _unflat(y, x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        layer, (kept,) = ctx.layer, ctx.saved_tensors
        matmul, used, dy = layer.matmul, layer.weight.narrow(0, 0, layer.rows), _flat(dy)
        wants_x, wants_weight, _ = ctx.needs_input_grad
        x = Pending(kept)
        if matmul.regather and wants_weight and not layer.weight_grad_store.is_deferring:
            x = matmul.gather(kept)
        dx = matmul.multiply_scatter(dy, used, gradient=True) if wants_x else None
        gradient = None
        if wants_weight:
            regathers_later = matmul.regather and layer.weight_grad_store.is_deferring
            gradient = _submit_weight_gradient(
                layer, used, dy, (lambda: matmul.gather(kept).wait()) if regathers_later else x.wait
            )
        return None if dx is None else dx.wait().view(ctx.shape), gradient, None


class _Row(torch.autograd.Function):
    """x [s, b, in/tp] -> [s(/tp), b, out]. The gathered gradient is kept until the weight gradient is done."""

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
    """[s/tp, b, in] -> [s, b, out/tp] with `sequence`, else [s, b, in] -> [s, b, out/tp].

    `outputs` maps global tensor names to their rows; their local shards lie one after another in one product.
    With `pad` a size that tp does not divide is rounded up and the padding left out of the product.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Mapping[str, int],
        tp: Axis,
        sequence: bool,
        init_std: float,
        pad: bool = False,
        product: Product | None = None,
    ):
        super().__init__()
        self.tp, self.sequence, self.outputs, self.in_features = (
            tp,
            sequence,
            dict(outputs),
            in_features,
        )
        slices, row, padded = [], 0, 0
        for name, size in outputs.items():
            assert pad or size % tp.size == 0, f"{name}: {size} rows do not divide over {tp}"
            start, stop = even_slice(size, tp.size, tp.rank)
            slices.append(
                ParamSlice(name, (size, in_features), 0, start, stop, row, init_std, decay=True)
            )
            row += stop - start
            padded += -(-size // tp.size)
        assert not pad or len(slices) == 1, "padding stands behind the one piece"
        self.rows = row
        self.weight = nn.Parameter(torch.empty(padded, in_features))
        self.slices = {"weight": tuple(slices)}
        self.matmul = choose_collective_matmul(tp, sequence, product)
        self.matmul.product.check(" + ".join(outputs), self.rows, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return _Column.apply(x, self.weight, self)

    def extra_repr(self) -> str:
        whole = "+".join(str(n) for n in self.outputs.values())
        return f"in={self.in_features}, out={self.rows} of {whole}, {self.tp}, sequence={self.sequence}"


class RowLinear(Sharded):
    """[s, b, in/tp] -> [s/tp, b, out] with `sequence`, else -> [s, b, out]."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        tp: Axis,
        sequence: bool,
        init_std: float,
        product: Product | None = None,
    ):
        super().__init__()
        assert in_features % tp.size == 0, f"{name}: {in_features} columns do not divide over {tp}"
        self.tp, self.sequence, self.in_features, self.out_features = (
            tp,
            sequence,
            in_features,
            out_features,
        )
        start, stop = even_slice(in_features, tp.size, tp.rank)
        self.weight = nn.Parameter(torch.empty(out_features, stop - start))
        self.slices = {
            "weight": (
                ParamSlice(
                    name, (out_features, in_features), 1, start, stop, 0, init_std, decay=True
                ),
            )
        }
        self.matmul = choose_collective_matmul(tp, sequence, product)
        self.matmul.product.check(name, out_features, stop - start)

    def forward(self, x: Tensor) -> Tensor:
        return _Row.apply(x, self.weight, self)

    def extra_repr(self) -> str:
        return f"in={self.weight.shape[1]} of {self.in_features}, out={self.out_features}, {self.tp}, sequence={self.sequence}"


class _Lookup(torch.autograd.Function):
    """Token ids [s, b] -> [s, b, h]: rows of the weight this rank holds, zeros for the others'.

    An id held elsewhere is looked up at its remainder and the result masked: were it row 0 for all of them, the backward
    pass would add most of a batch to one row, one after another.
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
    """Token ids [b, s] -> [s/tp, b, h] with `sequence`, else [s, b, h]. Each rank looks up the ids it holds.

    Raises DataError on an id outside the vocabulary (on CPU; on an accelerator, where asking would stall the queue, the
    result is NaN, which the finite check refuses): a plain masked lookup would give zeros and say nothing.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        tp: Axis,
        sequence: bool,
        init_std: float,
    ):
        super().__init__()
        self.tp, self.sequence, self.vocab_size, self.hidden_size = (
            tp,
            sequence,
            vocab_size,
            hidden_size,
        )
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
                f"token id {int(ids[position, row])} at row {row}, position {position} of a micro-batch is outside the vocabulary (model.vocab_size is {self.vocab_size})"
            )
        x = _Lookup.apply(ids, self.weight, self)
        if ids.device.type != "cpu":
            x = x.masked_fill(bad.unsqueeze(-1), float("nan"))
        return leave_parallel(x, self.tp, self.sequence)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids [s, b] -> rows of the weight [s, b], and which of the ids are held here (None: all)."""
        if self.tp.size == 1:
            return ids.clamp(0, self.vocab_size - 1), None
        return (ids - self.start).remainder(self.weight.shape[0]), (ids >= self.start) & (
            ids < self.stop
        )

    def add_rows(self, into: Tensor, ids: Tensor, dy: Tensor) -> None:
        """Add dy [s, b, h] to the rows of `into` [v/tp, h] that ids [s, b] name, in the order of the positions.

        The same additions in the same order at every run: on a CPU index_add_ goes row by row, on an accelerator, where
        it would add in any order, index_put_ sorts first.
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
        return f"ids={self.start}..{self.stop - 1} of {self.vocab_size}, hidden={self.hidden_size}, {self.tp}, sequence={self.sequence}"
