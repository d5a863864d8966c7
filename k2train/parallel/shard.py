"""What every parameter knows: which named global tensors it holds, and which slice of each.

A parameter is a stack of *pieces* along its first dimension. Most have one piece; the fused query/key/value product has
three, gate/up two. Initial weights, checkpoints, weight decay, the global norm and counting all read the pieces, so that
none of them depends on how products are fused or split. The alternative, one global tensor a parameter, would write the
fusion and the tensor-parallel degree into every checkpoint.

Rows a rank holds only to make the vocabulary divisible are outside every piece: they start at zero and nothing reaches them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from k2train.parallel.grad_accumulation import WeightGradStore


@dataclass(frozen=True)
class ParamSlice:
    """A slice of one named global tensor inside a local parameter."""

    name: str
    global_shape: tuple[int, ...]
    dim: int | None
    """The dimension split over tensor-parallel ranks; None: every one of them holds the whole tensor."""
    start: int
    stop: int
    """Indices of `dim` held here (all of dimension 0 when `dim` is None)."""
    row: int
    """First row of the local parameter that belongs to this piece."""
    init_std: float | None
    """Standard deviation of the initial normal draw; None: ones (norm weights)."""
    decay: bool
    sum_over_tensor: bool = False
    """The gradient is partial on each tensor-parallel rank (sequence parallelism: each saw its part of the sequence)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Local shape, without padding."""
        if self.dim is None:
            return self.global_shape
        return tuple(
            self.stop - self.start if d == self.dim else n for d, n in enumerate(self.global_shape)
        )

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The rows of a local parameter-shaped tensor that hold this piece (a view)."""
        return local.narrow(0, self.row, self.shape[0])


class Sharded(nn.Module):
    """A module that owns parameters; `slices` says for each what it holds."""

    slices: dict[str, tuple[ParamSlice, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.weight_grad_store = WeightGradStore()
        """Who says when weight gradients are done; the modules of one pipeline stage share one."""


def even_slice(size: int, parts: int, index: int) -> tuple[int, int]:
    """Part `index` of `size` items in blocks of ceil(size/parts): the last blocks may be short or empty.

    The same rule as torch.chunk and DTensor's Shard, which checkpoints rely on.
    """
    block = -(-size // parts)
    start = min(index * block, size)
    return start, min(start + block, size)


def named_slices(module: nn.Module) -> Iterator[tuple[nn.Parameter, ParamSlice]]:
    """Every (local parameter, piece) of a module tree, in definition order; each parameter must be covered."""
    seen: set[int] = set()
    for path, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            assert isinstance(child, Sharded) and name in child.slices, (
                f"{path}.{name} does not say what it holds"
            )
            assert id(parameter) not in seen, f"{path}.{name} is shared"
            seen.add(id(parameter))
            for param_slice in child.slices[name]:
                yield parameter, param_slice
