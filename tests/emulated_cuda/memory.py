"""Tensors of the emulated device seen from the host, and arguments of operations as trees."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the memory of a CUDA tensor."""
    storage = tensor.untyped_storage()
    same: Any = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), CPU, storage.nbytes()
    )
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(same, tensor.storage_offset(), tensor.shape, tensor.stride())


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CUDA tensor with the values and strides of a CPU tensor."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        on_cpu(made).copy_(tensor)
    return made


def leaves(tree: Any) -> Iterator[Any]:
    """Yield what lists, tuples and dicts hold: an operation's arguments have no other nesting."""
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from leaves(part)
    elif isinstance(tree, dict):
        yield from leaves(tuple(tree.values()))
    else:
        yield tree


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the tree with `function` of every leaf."""
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(function, part) for part in tree)
    if isinstance(tree, dict):
        return {key: mapped(function, part) for key, part in tree.items()}
    return function(tree)
