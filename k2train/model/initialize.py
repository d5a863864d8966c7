"""Weight initialization by (seed, global tensor name): the same fp32 draw in every layout.

- Rows are drawn in blocks of 256, each by a counter-based generator with its own key. A rank draws
  only the blocks its slice touches, and memory is bounded by one block a thread.
- Blocks do not depend on each other, so threads draw them side by side: the same values in any
  number of threads. NumPy draws without Python's lock.

Alternatives considered:
- Drawing only the columns of a slice: a normal number takes one draw of the generator or several,
  so where a column begins is known only when the columns before it are drawn.
- Drawing on the device: another generator, other weights.
- torch's generator: its stream depends on the device and on earlier draws.
- Drawing in bf16: the master weights would start rounded.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor, nn

from k2train.model.architecture import Architecture
from k2train.model.layers import Rotary
from k2train.model.transformer import Stage
from k2train.parallel.shard import ParamSlice, Sharded, named_slices

BLOCK_ROWS = 256


Mapper = Callable[[Callable[[int], None], range], Iterable[None]]
"""`map`, or that of a pool of threads."""


def draw_rows(
    seed: int,
    name: str,
    columns: int,
    std: float,
    start: int,
    stop: int,
    kept: slice = slice(None),
    mapper: Mapper = map,
) -> np.ndarray:
    """Draw rows start..stop of the tensor `name`, the `kept` ones of its columns.

    normal(0, std), float32 [rows, kept columns]. `mapper` calls a function for every block.
    """
    out = np.empty((stop - start, len(range(columns)[kept])), dtype=np.float32)

    def draw(block: int) -> None:
        key = int.from_bytes(
            sha256(f"k2train/initialize/{seed}/{name}/{block}".encode()).digest()[:16], "little"
        )
        first = block * BLOCK_ROWS
        drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(
            (BLOCK_ROWS, columns), dtype=np.float32
        )
        # A block is always drawn whole, so that a row does not depend on the slice.
        low, high = max(first, start), min(first + BLOCK_ROWS, stop)
        np.multiply(
            drawn[low - first : high - first, kept],
            np.float32(std),
            out=out[low - start : high - start],
        )

    # Consumed, so that every block is drawn and an error of a thread is raised.
    for _ in mapper(draw, range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS))):
        pass
    return out


def initial_slice(seed: int, param_slice: ParamSlice, mapper: Mapper = map) -> Tensor:
    """Initial values of a parameter slice, fp32, in its local shape."""
    if param_slice.init_std is None:
        return torch.ones(param_slice.shape)

    rows, columns = param_slice.global_shape
    start, stop, kept = 0, rows, slice(None)
    if param_slice.dim == 0:
        start, stop = param_slice.start, param_slice.stop
    elif param_slice.dim == 1:
        # Split along columns: every rank draws all rows and keeps its columns.
        kept = slice(param_slice.start, param_slice.stop)
    drawn = draw_rows(
        seed, param_slice.name, columns, param_slice.init_std, start, stop, kept, mapper
    )
    return torch.from_numpy(drawn)


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
    threads: int = 1,
) -> None:
    """Initialize every parameter slice of `modules`.

    `on_values(slice, fp32 values)` gets the values before rounding (for the optimizer's master
    weights). `threads` draw at the same time, and change no value.
    """
    with torch.no_grad(), ThreadPoolExecutor(max(1, threads), "initialize") as pool:
        mapper: Mapper = pool.map if threads > 1 else map
        for module in modules:
            for parameter, param_slice in named_slices(module):
                values = initial_slice(seed, param_slice, mapper)
                param_slice.of(parameter).copy_(values)
                if on_values is not None:
                    on_values(param_slice, values)


def attach_rotary(
    stages: Sequence[Stage], a: Architecture, sequence_length: int, device: torch.device
) -> None:
    """Give all stages of this rank one shared set of position tables."""
    rotary = Rotary(a.head_dim, sequence_length, a.rope_theta, device, a.rope_scaling)
    for stage in stages:
        stage.set_rotary(rotary)
