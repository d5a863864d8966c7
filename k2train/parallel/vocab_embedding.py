"""Vocabulary-parallel embedding: each tensor-parallel rank holds some rows of the table.

- A rank holds ceil(vocabulary/tp) rows. Rows past the vocabulary are padding.
- An id outside the vocabulary is an error, not a row of zeros.
- The weight gradient goes to its accumulator, at once or at a later time.

Alternatives considered:
- torch's embedding on a masked copy of the ids: its gradient is a tensor of the table's size in
  every micro-batch.

Source: Shoeybi et al. 2019 (arXiv:1909.08053) section 3.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2train.errors import DataError
from k2train.parallel.collectives import leave_parallel
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.parallel.grid import Axis
from k2train.parallel.shard import ParamSlice, Sharded, even_slice


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
        rows, dy = local.reshape(-1), dy.flatten(0, 1)
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
