"""Parameter metadata: the named global tensors a local parameter holds, and its slice of each.

- A parameter is a stack of *slices* along its first dimension. Most have one. The fused
  query/key/value product has three, gate/up two.
- Initial weights, checkpoints, weight decay, the global norm and parameter counts all read the
  slices. So none of them depends on how products are fused or split.
- Vocabulary padding rows belong to no slice. They start at zero and receive no gradient.

Alternatives considered:
- One global tensor per parameter: it writes the fusion and the tensor-parallel degree into every
  checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from k2train.parallel.grad_accumulation import WeightGradStore


@dataclass(frozen=True)
class ParamSlice:
    """Slice of one named global tensor inside a local parameter."""

    name: str
    global_shape: tuple[int, ...]
    dim: int | None
    """Dimension split over tensor-parallel ranks. None: every rank holds the whole tensor."""
    start: int
    stop: int
    """Range of `dim` held by this rank (all of dimension 0 when `dim` is None)."""
    row: int
    """First row of the slice in the local parameter."""
    init_std: float | None
    """Standard deviation of the initial normal draw. None: ones (norm weights)."""
    decay: bool
    sum_over_tensor: bool = False
    """Whether tensor-parallel ranks hold partial gradients.

    True with sequence parallelism, where each rank saw its part of the sequence.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Local shape, without padding."""
        if self.dim is None:
            return self.global_shape
        return tuple(
            self.stop - self.start if d == self.dim else n for d, n in enumerate(self.global_shape)
        )

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """Return the rows of a parameter-shaped tensor that hold this slice (a view)."""
        return local.narrow(0, self.row, self.shape[0])


class Sharded(nn.Module):
    """Base class of modules with parameters; `slices` maps each to its global slices."""

    slices: dict[str, tuple[ParamSlice, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.weight_grad_store = WeightGradStore()
        """Runs or defers weight gradients. Shared by all modules of one pipeline stage."""


def first_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the first rows of a tensor (a view); the tensor itself, without an operator, if all.

    The host's time of a small step is operators like this one, several for each product.
    """
    return x if rows == x.shape[0] else x.narrow(0, 0, rows)


def even_slice(size: int, parts: int, index: int) -> tuple[int, int]:
    """Split `size` items into blocks of ceil(size/parts); return the range of block `index`.

    The last blocks may be short or empty. Same rule as torch.chunk and DTensor's Shard, which
    checkpoints rely on.
    """
    block = -(-size // parts)
    start = min(index * block, size)
    return start, min(start + block, size)


def named_slices(module: nn.Module) -> Iterator[tuple[nn.Parameter, ParamSlice]]:
    """Iterate over every (local parameter, slice) of a module tree, in definition order.

    Fails when a parameter has no slices or is shared.
    """
    seen: set[int] = set()
    for path, child in module.named_modules():
        for name, parameter in child.named_parameters(recurse=False):
            assert isinstance(child, Sharded) and name in child.slices, (
                f"{path}.{name} has no slices"
            )
            assert id(parameter) not in seen, f"{path}.{name} is shared"
            seen.add(id(parameter))
            for param_slice in child.slices[name]:
                yield parameter, param_slice
