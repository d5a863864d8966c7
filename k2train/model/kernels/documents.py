"""Documents of a micro-batch, and attention that stops at their borders without a dense mask.

- One object for each micro-batch and stage. It holds what kernels need of the documents, each made
  at its first use: a packing, borders, a dense mask.
- Lengths are known in host memory, so no kernel waits for the device to learn a shape.
- `packed` gathers documents of like length into the batch of a causal kernel, and puts the result
  back. Its memory is that of the kernel at the length of the documents.
- The positions of a document that was padded repeat its last token. They come after it, so nothing
  looks at them, and their gradient is zero.

Alternatives considered:
- Blocks of queries against the keys from the earliest document of the block on: what a row computes
  would depend on its neighbours in the batch.
- torch's nested tensors: on a CPU their attention pads to the longest and takes a dense mask.
- flex_attention: its mask of blocks is made anew for each micro-batch, and it needs a compiler.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k2train.plan.documents import padded_length

Lengths = tuple[tuple[int, ...], ...]


def document_mask(documents: Tensor) -> Tensor:
    """Causal mask that stops at document borders: documents [b, s] -> bool [b, 1, s, s].

    True where the key belongs to the query's document and is not after it. At s = 8192 it is 64 MiB
    per sequence, kept until the backward of that micro-batch.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril_()


class Group(NamedTuple):
    """Documents that are attended together: `number` of them, padded to `length` positions."""

    start: int
    length: int
    number: int

    @property
    def stop(self) -> int:
        """First packed position after the group."""
        return self.start + self.length * self.number


class Packing(NamedTuple):
    """Where each token of a micro-batch is among the packed documents.

    Tokens count in the model's order of memory, [s, b], packed positions group by group as
    [length, number].
    """

    groups: tuple[Group, ...]
    source: Tensor
    """int64 [positions]: the token at each packed position."""
    target: Tensor
    """int64 [s b]: the packed position of each token."""
    padding: Tensor
    """int64: packed positions that are padding."""


class Documents:
    """Documents of a micro-batch: `ids` [b, s], the index of each token's document in its row.

    `host_ids` are the same in host memory, which must be given where `ids` are on a device. The
    tokens of a document are consecutive.
    """

    def __init__(self, ids: Tensor, host_ids: Tensor | None = None):
        host_ids = ids if host_ids is None else host_ids
        assert host_ids.device.type == "cpu", "documents on a device need their ids on the host too"
        assert ids.shape == host_ids.shape, "the documents are of other rows"
        self.ids, self._host_ids = ids, host_ids

    def rows(self, count: int) -> "Documents":
        """Return the documents of the first `count` rows."""
        return Documents(self.ids[:count], self._host_ids[:count])

    def cut(self, parts: int) -> list["Documents"]:
        """Cut into the documents of `parts` equal numbers of rows."""
        pairs = zip(self.ids.chunk(parts), self._host_ids.chunk(parts), strict=True)
        return [Documents(ids, host_ids) for ids, host_ids in pairs]

    @cached_property
    def lengths(self) -> Lengths:
        """Length of each document in tokens, row by row."""
        ids = self._host_ids.numpy()
        begins = [np.flatnonzero(row[1:] != row[:-1]) + 1 for row in ids]
        ends = (np.diff(row, prepend=0, append=ids.shape[1]) for row in begins)
        return tuple(tuple(row.tolist()) for row in ends)

    @cached_property
    def mask(self) -> Tensor:
        """Dense mask, bool [b, 1, s, s]."""
        return document_mask(self.ids)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(chain.from_iterable(self.lengths))

    @cached_property
    def borders(self) -> Tensor:
        """int32 [documents + 1] on the device: where documents begin and the last one ends.

        Counted through all rows, one after another.
        """
        ends = np.cumsum([0, *chain.from_iterable(self.lengths)])
        return _upload(ends.astype(np.int32), self.ids.device)

    @cached_property
    def packing(self) -> Packing | None:
        """Packing of the documents; None where each row is one document."""
        if all(len(row) == 1 for row in self.lengths):
            return None
        return pack(self.lengths, self.ids.device)


def pack(lengths: Lengths, device: torch.device) -> Packing:
    """Pack documents of these lengths, row by row, with its indices on a device."""
    rows, length = len(lengths), sum(lengths[0])
    found: dict[int, list[tuple[int, int]]] = {}
    for number, row in enumerate(lengths):
        start = 0
        for size in row:
            document = (start * rows + number, size)
            found.setdefault(padded_length(size, length), []).append(document)
            start += size

    groups, source, padding = [], [], []
    target = np.empty(rows * length, dtype=np.int64)
    start = 0
    for padded in sorted(found):
        first, size = np.array(found[padded], dtype=np.int64).T
        group = Group(start, padded, len(first))
        position = np.arange(padded)[:, None]
        tokens = first + np.minimum(position, size - 1) * rows

        packed = np.arange(group.start, group.stop).reshape(tokens.shape)
        real = position < size
        target[tokens[real]] = packed[real]
        source.append(tokens.ravel())
        padding.append(packed[~real])
        groups.append(group)
        start = group.stop

    indices = (np.concatenate(source), target, np.concatenate(padding))
    return Packing(tuple(groups), *(_upload(index, device) for index in indices))


def _upload(values: Any, device: torch.device) -> Tensor:
    """Copy an array to a device without a wait."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class _Pack(torch.autograd.Function):
    """[b, n, s, d] -> documents by group, each [documents, n, length, d].

    A tensor for each group: as slices of one, each would have a gradient of the size of all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> tuple[Tensor, ...]:
        ctx.packing, ctx.shape = packing, x.shape
        rows, (_, n, _, d) = _rows(x), x.shape
        return tuple(
            _heads(
                rows.index_select(0, packing.source[group.start : group.stop]),
                (group.number, n, group.length, d),
            )
            for group in packing.groups
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dgroups: Tensor) -> tuple[Tensor, None]:
        # Nothing looks at padding, so it has no gradient to add.
        dpacked = torch.cat([_rows(dgroup) for dgroup in dgroups])
        return _heads(dpacked.index_select(0, ctx.packing.target), ctx.shape), None


class _Unpack(torch.autograd.Function):
    """Documents by group, each [documents, n, length, d], -> [b, n, s, d]."""

    @staticmethod
    def forward(ctx: Any, packing: Packing, shape: torch.Size, *groups: Tensor) -> Tensor:
        ctx.packing = packing
        packed_rows = torch.cat([_rows(group) for group in groups])
        return _heads(packed_rows.index_select(0, packing.target), shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        packing, (_, n, _, d) = ctx.packing, dout.shape
        dpacked = _rows(dout).index_select(0, packing.source)
        dpacked.index_fill_(0, packing.padding, 0.0)
        dgroups = (
            _heads(dpacked[group.start : group.stop], (group.number, n, group.length, d))
            for group in packing.groups
        )
        return None, None, *dgroups


def _rows(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [s b, n d], without a copy in the model's order of memory."""
    b, n, s, d = x.shape
    return x.permute(2, 0, 1, 3).reshape(s * b, n * d)


def _heads(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """[s b, n d] -> [b, n, s, d] of that shape, without a copy."""
    b, n, s, d = shape
    return rows.view(s, b, n, d).permute(1, 2, 0, 3)


def packed(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a causal kernel that stops at document borders.

    It computes each document as the kernel would compute it alone, padded to `padded_length`.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        packing = None if documents is None else documents.packing
        if packing is None:
            return kernel(q, k, v, None)

        inputs = zip(*(_Pack.apply(x, packing) for x in (q, k, v)), strict=True)
        return _Unpack.apply(packing, q.shape, *(kernel(*each, None) for each in inputs))

    return attend
