"""fp32 gradient accumulation and one data-parallel reduction a step.

One flat buffer `[dp, elements]`: line r holds, of every piece, the block of rows that data-parallel rank r optimizes, so
that the whole step is one reduce-scatter and the shard that comes back is already in the optimizer's order. Rows go in
blocks of ceil(rows/dp), the rule of DTensor's Shard(0), so a shard can be written to a checkpoint as it lies. The cost is
a strided addition instead of a contiguous one, and at most dp-1 rows of padding a piece. Refused: cutting the flat buffer
anywhere (no padding, but a rank then holds pieces of rows that no checkpoint format describes).

Pieces with weight decay come first, so each half is one contiguous tensor for the optimizer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor, nn

from k2train.parallel.collectives import all_gather, all_reduce, reduce_scatter
from k2train.parallel.grid import Axis
from k2train.parallel.shard import Piece, even_slice, named_pieces

ALIGN = 64
"""Elements each half of a line is padded to: vector loops then have no tail, so a value's rounding does not depend on
where in the line it lies (and with it on the pipeline degree)."""


@dataclass(frozen=True)
class Slot:
    """Where one piece lies in a line of the buffer."""

    parameter: nn.Parameter
    piece: Piece
    block: int
    """Rows a data-parallel rank holds (the last ranks may hold fewer, or none)."""
    width: int
    """Elements a row."""
    offset: int

    @property
    def elements(self) -> int:
        return self.block * self.width

    def rows(self, dp: Axis) -> tuple[int, int]:
        """Rows of the piece that rank dp.rank optimizes."""
        return even_slice(self.piece.shape[0], dp.size, dp.rank)


class SlotTable:
    """The order and offsets of all pieces of this rank in one line."""

    def __init__(self, pieces: Iterable[tuple[nn.Parameter, Piece]], dp: Axis):
        self.dp = dp
        ordered = sorted(pieces, key=lambda pair: not pair[1].decay)
        slots, offset, self.decayed = [], 0, 0
        for index, (parameter, piece) in enumerate(ordered):
            rows = piece.shape[0]
            block = -(-rows // dp.size)
            width = 1
            for n in piece.shape[1:]:
                width *= n
            slots.append(Slot(parameter, piece, block, width, offset))
            offset += block * width
            if piece.decay and (index + 1 == len(ordered) or not ordered[index + 1][1].decay):
                offset = -(-offset // ALIGN) * ALIGN
                self.decayed = offset
        self.slots: tuple[Slot, ...] = tuple(slots)
        self.elements = -(-offset // ALIGN) * ALIGN

    def local(self, line: Tensor, slot: Slot) -> Tensor:
        """The view of `line` [elements] that holds this rank's rows of a piece, in the piece's shape."""
        start, stop = slot.rows(self.dp)
        return line.narrow(0, slot.offset, (stop - start) * slot.width).view(stop - start, *slot.piece.shape[1:])

    def blocks(self, lines: Tensor, slot: Slot) -> Tensor:
        """The view of `lines` [dp, elements] that holds all blocks of a piece: [dp, block, width]."""
        return lines.narrow(1, slot.offset, slot.elements).view(self.dp.size, slot.block, slot.width)

    def each_block(self, lines: Tensor, slot: Slot, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs (view of lines, rows of a piece-shaped tensor) that cover the piece: whole blocks, then the short one."""
        if slot.block == 0:
            return []
        blocks, flat = self.blocks(lines, slot), rows.reshape(rows.shape[0], slot.width)
        whole, rest = divmod(rows.shape[0], slot.block)
        pairs = [(blocks[:whole], flat[: whole * slot.block].view(whole, slot.block, slot.width))]
        if rest:
            pairs.append((blocks[whole, :rest], flat[whole * slot.block :]))
        return pairs


class GradientBuffer:
    """Collects gradients of all micro-batches in fp32, then reduces them over data-parallel ranks once."""

    def __init__(self, modules: Sequence[nn.Module], dp: Axis, tp: Axis, device: torch.device):
        pairs = [pair for module in modules for pair in named_pieces(module)]
        self.table = SlotTable(pairs, dp)
        self.dp, self.tp = dp, tp
        self.lines = torch.zeros(dp.size, self.table.elements, dtype=torch.float32, device=device)
        self._of: dict[int, list[Slot]] = {}
        for slot in self.table.slots:
            self._of.setdefault(id(slot.parameter), []).append(slot)
        # A hook is held by the parameter from C++, where Python's collector does not look: with a plain reference to this
        # buffer, which holds the parameters, neither would ever be freed, nor the process groups they refer to.
        this = ref(self)

        def collect(parameter: Tensor) -> None:
            buffer = this()
            assert buffer is not None, "a backward ran after its gradient buffer was gone"
            buffer._collect(parameter)

        for slots in self._of.values():
            slots[0].parameter.register_post_accumulate_grad_hook(collect)

    def _collect(self, parameter: Tensor) -> None:
        assert parameter.grad is not None, "a gradient hook without a gradient"
        for slot in self._of[id(parameter)]:
            for into, rows in self.table.each_block(self.lines, slot, slot.piece.of(parameter.grad)):
                into.add_(rows)
        parameter.grad = None

    def zero(self) -> None:
        self.lines.zero_()

    def reduce(self) -> Tensor:
        """Sum what sequence parallelism left partial, then over data-parallel ranks: this rank's line [elements], fp32."""
        self._sum_over_tensor()
        return reduce_scatter(self.lines, self.dp).view(-1) if self.dp.size > 1 else self.lines[0]

    def _sum_over_tensor(self) -> None:
        partial = [slot for slot in self.table.slots if slot.piece.sum_over_tensor]
        if self.tp.size == 1 or not partial:
            return
        views = [self.table.blocks(self.lines, slot) for slot in partial]
        flat = all_reduce(torch.cat([view.reshape(-1) for view in views]), self.tp)
        for view, part in zip(views, flat.split([view.numel() for view in views]), strict=True):
            view.copy_(part.view(view.shape))

    def full(self, slot: Slot) -> Tensor:
        """The whole local gradient of a piece as accumulated here, before any reduction (for tests and tools)."""
        rows = torch.zeros(slot.piece.shape, device=self.lines.device)
        for held, out in self.table.each_block(self.lines, slot, rows):
            out.copy_(held)
        return rows


def publish(table: SlotTable, line: Tensor) -> None:
    """Write optimized values back: this rank's `line` [elements] in the parameters' dtype, gathered over data-parallel ranks."""
    lines = all_gather(line.view(1, -1), table.dp)
    for slot in table.slots:
        rows = slot.piece.of(slot.parameter.data)
        for held, out in table.each_block(lines, slot, rows):
            out.copy_(held)
