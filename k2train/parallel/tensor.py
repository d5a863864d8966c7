"""Tensor-parallel linear layers and embedding. Sequence parallelism is an argument, not a subclass.

    ColumnLinear  y = x [W_1 W_2 ... W_tp]: each rank holds some outputs; several global tensors may share one product
    RowLinear     y = sum_r x_r W_r:        each rank holds some inputs; the sum leaves through leave_parallel
    VocabEmbedding, and ColumnLinear as the head, hold ceil(vocabulary/tp) rows each; rows past the vocabulary are padding

Source: Shoeybi et al. 2019 (arXiv:1909.08053) section 3. There are no biases in this architecture, so there are none here.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2train.errors import DataError
from k2train.parallel.collectives import enter_parallel, leave_parallel
from k2train.parallel.grid import Axis
from k2train.parallel.shard import Piece, Sharded, even_slice


class ColumnLinear(Sharded):
    """[s/tp, b, in] -> [s, b, out/tp] with `sequence`, else [s, b, in] -> [s, b, out/tp].

    `outputs` maps global tensor names to their rows; their local shards lie one after another in one product.
    With `pad` a size that tp does not divide is rounded up and the padding left out of the product.
    """

    def __init__(
        self, in_features: int, outputs: Mapping[str, int], tp: Axis, sequence: bool, init_std: float, pad: bool = False
    ):
        super().__init__()
        self.tp, self.sequence, self.outputs, self.in_features = tp, sequence, dict(outputs), in_features
        pieces, row, padded = [], 0, 0
        for name, size in outputs.items():
            assert pad or size % tp.size == 0, f"{name}: {size} rows do not divide over {tp}"
            start, stop = even_slice(size, tp.size, tp.rank)
            pieces.append(Piece(name, (size, in_features), 0, start, stop, row, init_std, decay=True))
            row += stop - start
            padded += -(-size // tp.size)
        assert not pad or len(pieces) == 1, "padding stands behind the one piece"
        self.rows = row
        self.weight = nn.Parameter(torch.empty(padded, in_features))
        self.pieces = {"weight": tuple(pieces)}

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.rows == self.weight.shape[0] else self.weight.narrow(0, 0, self.rows)
        return F.linear(enter_parallel(x, self.tp, self.sequence), weight)

    def extra_repr(self) -> str:
        whole = "+".join(str(n) for n in self.outputs.values())
        return f"in={self.in_features}, out={self.rows} of {whole}, {self.tp}, sequence={self.sequence}"


class RowLinear(Sharded):
    """[s, b, in/tp] -> [s/tp, b, out] with `sequence`, else -> [s, b, out]."""

    def __init__(self, name: str, in_features: int, out_features: int, tp: Axis, sequence: bool, init_std: float):
        super().__init__()
        assert in_features % tp.size == 0, f"{name}: {in_features} columns do not divide over {tp}"
        self.tp, self.sequence, self.in_features, self.out_features = tp, sequence, in_features, out_features
        start, stop = even_slice(in_features, tp.size, tp.rank)
        self.weight = nn.Parameter(torch.empty(out_features, stop - start))
        self.pieces = {"weight": (Piece(name, (out_features, in_features), 1, start, stop, 0, init_std, decay=True),)}

    def forward(self, x: Tensor) -> Tensor:
        return leave_parallel(F.linear(x, self.weight), self.tp, self.sequence)

    def extra_repr(self) -> str:
        return f"in={self.weight.shape[1]} of {self.in_features}, out={self.out_features}, {self.tp}, sequence={self.sequence}"


class VocabEmbedding(Sharded):
    """Token ids [b, s] -> [s/tp, b, h] with `sequence`, else [s, b, h]. Each rank looks up the ids it holds.

    Raises DataError on an id outside the vocabulary (on CPU; on an accelerator, where asking would stall the queue, the
    result is NaN, which the finite check refuses): a plain masked lookup would give zeros and say nothing.
    """

    def __init__(self, name: str, vocab_size: int, hidden_size: int, tp: Axis, sequence: bool, init_std: float):
        super().__init__()
        self.tp, self.sequence, self.vocab_size, self.hidden_size = tp, sequence, vocab_size, hidden_size
        self.start, self.stop = even_slice(vocab_size, tp.size, tp.rank)
        self.weight = nn.Parameter(torch.empty(-(-vocab_size // tp.size), hidden_size))
        self.pieces = {
            "weight": (Piece(name, (vocab_size, hidden_size), 0, self.start, self.stop, 0, init_std, decay=True),)
        }

    def forward(self, tokens: Tensor) -> Tensor:
        ids = tokens.t()
        bad = (ids < 0) | (ids >= self.vocab_size)
        if ids.device.type == "cpu" and bool(bad.any()):
            position, row = (int(i) for i in bad.nonzero()[0])
            raise DataError(
                f"token id {int(ids[position, row])} at row {row}, position {position} of a micro-batch is outside the vocabulary (model.vocab_size is {self.vocab_size})"
            )
        mine = (ids >= self.start) & (ids < self.stop)
        local = torch.where(mine, ids - self.start, 0)
        x = F.embedding(local, self.weight)
        if self.tp.size > 1:
            x = x * mine.unsqueeze(-1)
        if ids.device.type != "cpu":
            x = x.masked_fill(bad.unsqueeze(-1), float("nan"))
        return leave_parallel(x, self.tp, self.sequence)

    def extra_repr(self) -> str:
        return f"ids={self.start}..{self.stop - 1} of {self.vocab_size}, hidden={self.hidden_size}, {self.tp}, sequence={self.sequence}"
