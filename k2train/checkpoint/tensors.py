"""Optimizer lines as named global tensors: what torch.distributed.checkpoint is given, and where it loads into.

Each piece becomes a DTensor on the mesh (tp, dp): the tensor-parallel slice first, then this rank's rows of it. The file
then holds global names, shapes and offsets, and any other grid can read it.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from k2train.parallel.gradients import Slot, SlotTable

MASTER = "master"
"""The state whose rounding is the model's weights; the optimizer's other states are its own affair."""


def as_global(slot: Slot, local: Tensor, mesh: DeviceMesh) -> DTensor:
    """Wrap this rank's rows of a piece, without copying and without communication."""
    shape = torch.Size(slot.piece.global_shape)
    stride = torch.empty(shape, device="meta").stride()
    over_tensor = Replicate() if slot.piece.dim is None else Shard(slot.piece.dim)
    return DTensor.from_local(local, mesh, [over_tensor, Shard(0)], run_check=False, shape=shape, stride=stride)


def model_tensors(table: SlotTable, weights: Tensor, mesh: DeviceMesh) -> dict[str, DTensor]:
    """{name: weight} from a line [elements] in the weights' dtype."""
    return {slot.piece.name: as_global(slot, table.local(weights, slot), mesh) for slot in table.slots}


def optimizer_tensors(table: SlotTable, lines: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, DTensor]:
    """{name.state: value} from fp32 lines [elements], one for each state."""
    return {
        f"{slot.piece.name}.{state}": as_global(slot, table.local(lines[state], slot), mesh)
        for slot in table.slots
        for state in lines
    }


def describe(tensors: dict[str, DTensor]) -> dict[str, dict[str, object]]:
    """Shapes and dtypes for the manifest."""
    return {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in sorted(tensors.items())
    }
