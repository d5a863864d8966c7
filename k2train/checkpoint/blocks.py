"""Optimizer lines as blocks of named global tensors: what goes into a shard file, and where a file's blocks go.

A rank's part of a tensor is one box: its tensor-parallel slice, then its rows of it. A tensor that every tensor-parallel
rank holds whole is written by the first of them. The file then holds global names, shapes and offsets, and any other grid
can read it. DTensors with a planner were refused: they find out by messages what the slot table says already.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k2train.checkpoint.shards import Block
from k2train.parallel.grad_buffer import BufferSlot, ShardLayout
from k2train.parallel.grid import Axis

MASTER = "master"
"""The state whose rounding is the model's weights; the optimizer's other states are its own affair."""

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Box:
    """This rank's rows of a piece within its global tensor."""

    name: str
    slot: BufferSlot
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def empty(self) -> bool:
        return 0 in self.shape


def local_boxes(layout: ShardLayout) -> Iterator[Box]:
    """The box of every slot; some may be empty."""
    for slot in layout.slots:
        param_slice, (low, high) = slot.param_slice, slot.rows(layout.dp)
        offsets = [
            param_slice.start if d == param_slice.dim else 0
            for d in range(len(param_slice.global_shape))
        ]
        offsets[0] += low
        yield Box(param_slice.name, slot, tuple(offsets), (high - low, *param_slice.shape[1:]))


def owned_boxes(layout: ShardLayout, tp: Axis) -> list[Box]:
    """The boxes that this rank writes: none empty, and each value of the model by one rank."""
    return [
        box
        for box in local_boxes(layout)
        if not box.empty and (box.slot.param_slice.dim is not None or tp.rank == 0)
    ]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def model_blocks(layout: ShardLayout, master: Tensor, dtype: torch.dtype, tp: Axis) -> list[Block]:
    """{name: weight} rounded from the fp32 master line [elements] when its bytes are asked for."""

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
    """{name.state: value} from fp32 host lines [elements], one for each state."""

    def block(box: Box, state: str) -> Block:
        view = layout.local(flat_shards[state], box.slot)
        name = f"{box.name}.{state}"
        return Block(
            name, box.offsets, box.shape, dtype_name(view.dtype), lambda: tensor_bytes(view)
        )

    return [block(box, state) for box in owned_boxes(layout, tp) for state in flat_shards]


def describe_tensors(
    layout: ShardLayout, dtype: torch.dtype, states: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Shapes and dtypes of this rank's tensors for the manifest, by folder."""
    shapes = {slot.param_slice.name: list(slot.param_slice.global_shape) for slot in layout.slots}
    weights = {name: {"shape": shape, "dtype": dtype_name(dtype)} for name, shape in shapes.items()}
    optimizer = {
        f"{name}.{state}": {"shape": shape, "dtype": dtype_name(flat_shard.dtype)}
        for name, shape in shapes.items()
        for state, flat_shard in states.items()
    }
    return {"model": weights, "optimizer": optimizer}
