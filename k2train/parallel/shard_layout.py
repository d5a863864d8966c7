"""Flat shard of a data-parallel rank: the order and offsets of all its parameter slices.

- Each data-parallel rank owns a *flat shard*: its row block of every parameter slice, concatenated.
  Blocks have ceil(rows/dp) rows, DTensor's Shard(0) rule, so a checkpoint can store a shard
  unchanged. The price is at most dp-1 padding rows per slice.
- A bucket is a range of the flat shard: one transfer.
- Slices with weight decay come first, so each half is one contiguous tensor for the optimizer.
  Those without (norms) are small and form the last bucket.

Alternatives considered:
- Cutting the shard anywhere: no padding, but a rank then holds parts of rows, which no checkpoint
  format describes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from k2train.parallel.grid import Axis
from k2train.parallel.shard import ParamSlice, even_slice
from k2train.plan.memory import BUCKET_BYTES

ALIGN = 64
"""Alignment, in elements, of parameters and of both halves of a shard.

Vector loops then have no tail and products see the same alignment. So a value's rounding does not
depend on its offset, nor on the pipeline degree.
"""


@dataclass(frozen=True)
class BufferSlot:
    """Position of one parameter slice in a flat shard."""

    parameter: nn.Parameter
    param_slice: ParamSlice
    block: int
    """Rows a data-parallel rank holds (the last ranks may hold fewer, or none)."""
    width: int
    """Elements per row."""
    offset: int

    @property
    def elements(self) -> int:
        """Elements of the slot, padding included."""
        return self.block * self.width

    def rows(self, dp: Axis) -> tuple[int, int]:
        """Range of the slice's rows that rank dp.rank optimizes."""
        return even_slice(self.param_slice.shape[0], dp.size, dp.rank)


@dataclass(frozen=True)
class Bucket:
    """Range `start` to `stop` of the flat shard and its slots: one transfer."""

    start: int
    stop: int
    slots: tuple[BufferSlot, ...]

    @property
    def elements(self) -> int:
        """Elements of the range."""
        return self.stop - self.start


class ShardLayout:
    """Order and offsets of all parameter slices of this rank in one flat shard."""

    def __init__(self, slices: Iterable[tuple[nn.Parameter, ParamSlice]], dp: Axis):
        self.dp = dp

        # Parameters in definition order, each with its slices.
        grouped: dict[int, tuple[nn.Parameter, list[ParamSlice]]] = {}
        for parameter, param_slice in slices:
            grouped.setdefault(id(parameter), (parameter, []))[1].append(param_slice)

        for _, held in grouped.values():
            assert len({param_slice.decay for param_slice in held}) == 1, (
                f"{held[0].name}: all slices of a parameter must decay, or none"
            )

        slots: list[BufferSlot] = []
        offset = self.decayed = 0
        for decay in (True, False):
            for parameter, held in grouped.values():
                if held[0].decay == decay:
                    offset = self._append_slots(parameter, held, offset, slots)
            self.decayed = offset if decay else self.decayed

        self.slots: tuple[BufferSlot, ...] = tuple(slots)
        self.elements = offset

    def _append_slots(
        self,
        parameter: nn.Parameter,
        held: Sequence[ParamSlice],
        offset: int,
        slots: list[BufferSlot],
    ) -> int:
        """Append a parameter's slots from `offset` on; return the offset of the next parameter."""
        width = prod(parameter.shape[1:])
        first = offset
        for param_slice in held:
            block = -(-param_slice.shape[0] // self.dp.size)
            at = first + param_slice.row * width if self.dp.size == 1 else offset
            slots.append(BufferSlot(parameter, param_slice, block, width, at))
            offset = at + block * width
        # One rank keeps a parameter's padding rows in the shard too, so that its sum is one view.
        offset = first + parameter.numel() if self.dp.size == 1 else offset
        return -(-offset // ALIGN) * ALIGN

    def parameters(self) -> list[tuple[nn.Parameter, list[BufferSlot]]]:
        """Return every parameter with its slots, in the order of the shard."""
        found: dict[int, tuple[nn.Parameter, list[BufferSlot]]] = {}
        for slot in self.slots:
            found.setdefault(id(slot.parameter), (slot.parameter, []))[1].append(slot)
        return list(found.values())

    def buckets(self, limit_bytes: int | None = None) -> tuple[Bucket, ...]:
        """Cut the shard between parameters into buckets, in its order.

        The decayed half goes in transfers of about `limit_bytes` (fp32, all ranks' rows; the first
        takes the remainder). The rest is one bucket.
        """
        # Cut from the end, the order in which a backward pass completes the parameters.
        limit = (limit_bytes or BUCKET_BYTES) // (4 * self.dp.size)
        cuts, stop = [self.decayed], self.decayed
        decayed = [held for _, held in self.parameters() if held[0].param_slice.decay]

        for held in reversed(decayed):
            if stop - held[0].offset >= limit or held is decayed[0]:
                stop = held[0].offset
                cuts.append(stop)

        edges = [*reversed(cuts), self.elements]
        found = []
        for start, stop in pairwise(edges):
            inside = tuple(slot for slot in self.slots if start <= slot.offset < stop)
            if stop > start:
                found.append(Bucket(start, stop, inside))

        return tuple(found)

    def local(self, shard: Tensor, slot: BufferSlot) -> Tensor:
        """View this rank's rows of a slice in `shard` [elements], in the slice's shape."""
        start, stop = slot.rows(self.dp)
        return shard.narrow(0, slot.offset, (stop - start) * slot.width).view(
            stop - start, *slot.param_slice.shape[1:]
        )

    def each_block(
        self, shards: Tensor, slot: BufferSlot, rows: Tensor, first: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """Pair blocks of `shards` with rows of a slice-shaped tensor; a short block is last.

        `shards` [dp, n] are all ranks' shards from element `first` on.
        """
        if slot.block == 0:
            return []
        blocks = shards.narrow(1, slot.offset - first, slot.elements).view(
            self.dp.size, slot.block, slot.width
        )
        flat = rows.reshape(rows.shape[0], slot.width)
        whole, rest = divmod(rows.shape[0], slot.block)
        pairs = [(blocks[:whole], flat[: whole * slot.block].view(whole, slot.block, slot.width))]
        if rest:
            pairs.append((blocks[whole, :rest], flat[whole * slot.block :]))

        return pairs
