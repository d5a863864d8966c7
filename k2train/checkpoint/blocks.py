"""Optimizer shards as named blocks of global tensors, the unit that shard files store.

- A rank's part of a tensor is one box: its tensor-parallel slice, then its rows of that slice.
- A tensor that every tensor-parallel rank holds whole is written by the first of them only.
- Files hold global names, shapes and offsets, so any other process grid can read them.

Alternatives considered:
- DTensors with a planner: they learn by messages what the shard layout already says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from k2train.checkpoint.manifest import TensorFacts
from k2train.checkpoint.shards import Block
from k2train.parallel.grid import Axis
from k2train.parallel.shard_layout import BufferSlot, ShardLayout

MASTER = "master"
"""State whose rounding gives the model's weights. Only the optimizer interprets the other states.
"""

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Box:
    """This rank's rows of a parameter slice, placed within the global tensor."""

    name: str
    slot: BufferSlot
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def empty(self) -> bool:
        """Whether the box holds no values."""
        return 0 in self.shape


def local_boxes(layout: ShardLayout) -> Iterator[Box]:
    """Yield the box of every slot in the shard layout. Some boxes may be empty."""
    for slot in layout.slots:
        param_slice, (low, high) = slot.param_slice, slot.rows(layout.dp)
        # The slice begins at its own offset along its dimension; rows are cut along the first one.
        offsets = [
            param_slice.start if d == param_slice.dim else 0
            for d in range(len(param_slice.global_shape))
        ]
        offsets[0] += low
        yield Box(param_slice.name, slot, tuple(offsets), (high - low, *param_slice.shape[1:]))


def owned_boxes(layout: ShardLayout, tp: Axis) -> list[Box]:
    """Boxes that this rank writes: none empty, and each value of the model by exactly one rank."""
    return [
        box
        for box in local_boxes(layout)
        # A slice without a dimension is held whole by every tensor-parallel rank.
        if not box.empty and (box.slot.param_slice.dim is not None or tp.rank == 0)
    ]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """View the bytes of a contiguous host tensor, without a copy."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a torch dtype without the `torch.` prefix."""
    return str(dtype).removeprefix("torch.")


def model_blocks(layout: ShardLayout, master: Tensor, dtype: torch.dtype, tp: Axis) -> list[Block]:
    """Blocks {name: weight}, rounded from the fp32 master shard [elements].

    The rounding happens when a block's bytes are read.
    """

    def block(box: Box) -> Block:
        view = layout.local(master, box.slot)
        return Block(
            box.name,
            box.offsets,
            box.shape,
            dtype_name(dtype),
            lambda: tensor_bytes(view.to(dtype)),
        )

    return [block(box) for box in owned_boxes(layout, tp)]


def optimizer_blocks(
    layout: ShardLayout, flat_shards: Mapping[str, Tensor], tp: Axis
) -> list[Block]:
    """Blocks {name.state: value} of the fp32 flat shards [elements] in host memory."""

    def block(box: Box, state: str) -> Block:
        view = layout.local(flat_shards[state], box.slot)
        name = f"{box.name}.{state}"
        return Block(
            name, box.offsets, box.shape, dtype_name(view.dtype), lambda: tensor_bytes(view)
        )

    return [block(box, state) for box in owned_boxes(layout, tp) for state in flat_shards]


def describe_tensors(
    layout: ShardLayout, dtype: torch.dtype, states: Mapping[str, Tensor]
) -> dict[str, dict[str, TensorFacts]]:
    """Shapes and dtypes of this rank's tensors for the manifest, by folder."""
    shapes = {slot.param_slice.name: list(slot.param_slice.global_shape) for slot in layout.slots}
    weights = {
        name: TensorFacts(shape=shape, dtype=dtype_name(dtype)) for name, shape in shapes.items()
    }
    optimizer = {
        f"{name}.{state}": TensorFacts(shape=shape, dtype=dtype_name(flat_shard.dtype))
        for name, shape in shapes.items()
        for state, flat_shard in states.items()
    }
    return {"model": weights, "optimizer": optimizer}
