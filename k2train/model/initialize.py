"""Initial weights by (seed, global tensor name), drawn in fp32 and then sliced: the same whatever the layout.

Rows are drawn in blocks of 256, each with a counter-based generator of its own key, so a rank draws only the blocks its
slice touches and the memory is bounded by a block. Refused: torch's generator (its stream depends on the device and on
how much was drawn before) and drawing in bf16 (the master weights would start rounded).
"""

from collections.abc import Callable, Sequence
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor, nn

from k2train.model.layers import Rotary
from k2train.model.transformer import Architecture, Stage
from k2train.parallel.shard import ParamSlice, Sharded, named_slices

BLOCK_ROWS = 256


def draw_rows(seed: int, name: str, columns: int, std: float, start: int, stop: int) -> np.ndarray:
    """Rows start..stop of the initial tensor `name`: normal(0, std), float32 [stop - start, columns]."""
    out = np.empty((stop - start, columns), dtype=np.float32)
    for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
        key = int.from_bytes(
            sha256(f"k2train/initialize/{seed}/{name}/{block}".encode()).digest()[:16], "little"
        )
        first = block * BLOCK_ROWS
        rows = np.random.Generator(np.random.Philox(key=key)).standard_normal(
            (BLOCK_ROWS, columns), dtype=np.float32
        )
        low, high = max(first, start), min(first + BLOCK_ROWS, stop)
        out[low - start : high - start] = rows[low - first : high - first]
    return out * np.float32(std)


def initial_slice(seed: int, param_slice: ParamSlice) -> Tensor:
    """The initial values of a piece, fp32, in its local shape."""
    if param_slice.init_std is None:
        return torch.ones(param_slice.shape)
    rows, columns = param_slice.global_shape
    if param_slice.dim == 0:
        return torch.from_numpy(
            draw_rows(
                seed,
                param_slice.name,
                columns,
                param_slice.init_std,
                param_slice.start,
                param_slice.stop,
            )
        )
    whole = draw_rows(seed, param_slice.name, columns, param_slice.init_std, 0, rows)
    if param_slice.dim is None:
        return torch.from_numpy(whole)
    return torch.from_numpy(np.ascontiguousarray(whole[:, param_slice.start : param_slice.stop]))


def materialize(
    build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Build a module on the meta device, then give its parameters memory in `dtype`, all zero (padding stays so)."""
    with torch.device("meta"):
        module = build()
    for child in module.modules():
        if isinstance(child, Sharded):
            for name, parameter in list(child.named_parameters(recurse=False)):
                setattr(
                    child,
                    name,
                    nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device)),
                )
    return module


def initialize(
    modules: Sequence[nn.Module],
    seed: int,
    on_values: Callable[[ParamSlice, Tensor], None] | None = None,
) -> None:
    """Fill every piece. `also(piece, fp32 values)` sees them before rounding (for the optimizer's master weights)."""
    with torch.no_grad():
        for module in modules:
            for parameter, param_slice in named_slices(module):
                values = initial_slice(seed, param_slice)
                param_slice.of(parameter).copy_(values)
                if on_values is not None:
                    on_values(param_slice, values)


def attach_rotary(
    stages: Sequence[Stage], a: Architecture, sequence_length: int, device: torch.device
) -> None:
    """One set of position tables, shared by all stages of this rank."""
    rotary = Rotary(a.head_dim, sequence_length, a.rope_theta, device)
    for stage in stages:
        stage.set_rotary(rotary)
