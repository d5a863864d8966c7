"""Weight initialization by (seed, global tensor name): the same fp32 draw in every layout.

- Rows are drawn in blocks of 256, each by a counter-based generator with its own key. A rank draws
  only the blocks its slice touches, and memory is bounded by one block.

Alternatives considered:
- torch's generator: its stream depends on the device and on earlier draws.
- Drawing in bf16: the master weights would start rounded.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor, nn

from k2train.model.architecture import Architecture
from k2train.model.layers import Rotary
from k2train.model.transformer import Stage
from k2train.parallel.shard import ParamSlice, Sharded, named_slices

BLOCK_ROWS = 256


def draw_rows(seed: int, name: str, columns: int, std: float, start: int, stop: int) -> np.ndarray:
    """Draw rows start..stop of the tensor `name`: normal(0, std), float32 [rows, columns]."""
    out = np.empty((stop - start, columns), dtype=np.float32)
    for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
        key = int.from_bytes(
            sha256(f"k2train/initialize/{seed}/{name}/{block}".encode()).digest()[:16], "little"
        )
        first = block * BLOCK_ROWS
        rows = np.random.Generator(np.random.Philox(key=key)).standard_normal(
            (BLOCK_ROWS, columns), dtype=np.float32
        )
        # A block is always drawn whole, so that a row does not depend on the slice.
        low, high = max(first, start), min(first + BLOCK_ROWS, stop)
        out[low - start : high - start] = rows[low - first : high - first]

    return out * np.float32(std)


def initial_slice(seed: int, param_slice: ParamSlice) -> Tensor:
    """Initial values of a parameter slice, fp32, in its local shape."""
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

    # Split along columns: every rank draws all rows and keeps its columns.
    whole = draw_rows(seed, param_slice.name, columns, param_slice.init_std, 0, rows)
    if param_slice.dim is None:
        return torch.from_numpy(whole)

    return torch.from_numpy(np.ascontiguousarray(whole[:, param_slice.start : param_slice.stop]))


def materialize(
    build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Build a module on the meta device, then allocate its parameters in `dtype`, all zero.

    Padding rows stay zero.
    """
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
    """Initialize every parameter slice of `modules`.

    `on_values(slice, fp32 values)` gets the values before rounding (for the optimizer's master
    weights).
    """
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
    """Give all stages of this rank one shared set of position tables."""
    rotary = Rotary(a.head_dim, sequence_length, a.rope_theta, device)
    for stage in stages:
        stage.set_rotary(rotary)
