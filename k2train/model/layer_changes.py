"""Check that a layer is as it was built: no part, kernel, method or weight replaced, and no hooks.

- A layer that is one autograd function (`layer_function`) calls formulas, and no part of it. It
  would silently ignore whatever was put into a part, and whoever looks at one.
- So such a layer is checked at each forward, in 7 us of some 900. Where anything differs, it runs
  part by part.
- Weights are looked at too. The function adds every gradient to its sum: it would train a frozen
  weight, and lose the gradient of a weight without a sum.

Alternatives considered:
- A check when the layer is built: adapters, probes and frozen weights come later.
- A flag to be set by whoever changes a layer: it would be forgotten, and nobody would notice.
"""

from typing import Protocol

from torch import nn

from k2train.model.attention import Attention
from k2train.model.kernels.formulas import Formulas
from k2train.model.kernels.select import Kernels
from k2train.model.layers import FeedForward, RMSNorm
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.parallel.tensor_parallel import ColumnLinear, RowLinear


class Layer(Protocol):
    """The parts of a layer."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: FeedForward
    kernels: Kernels
    formulas: Formulas | None
    """What it runs by as one function; None where its kernels have none."""
    parts: tuple[nn.Module, ...]
    """`parts_of` the layer as it was built."""
    _modules: dict[str, nn.Module]


def parts_of(layer: Layer) -> tuple[nn.Module, ...]:
    """Return the modules below a layer, as they are now."""
    children = layer._modules
    below = children["attention"]._modules.values(), children["mlp"]._modules.values()
    return (*children.values(), *below[0], *below[1])


def is_unchanged(layer: Layer) -> bool:
    """Whether a layer computes what it did when it was built, unheard, with sums for gradients."""
    if nn.modules.module._has_any_global_hook() or parts_of(layer) != layer.parts:
        return False
    return _has_own_steps(layer) and all(map(_is_untouched, layer.parts))


_FORWARDS = {
    part: part.forward for part in (RMSNorm, Attention, FeedForward, ColumnLinear, RowLinear)
}
"""What is written out here. A subclass, a parametrized module's too, may compute something else."""
_STEPS = {"inner", "activate", "outer"}
"""Methods of a layer, which may be replaced in one object."""


def _has_own_steps(layer: Layer) -> bool:
    """Whether no kernel and no method was put in after the layer was built."""
    kernels = layer.kernels
    attention_norm, attention, mlp_norm, mlp = layer._modules.values()
    return (
        attention.kernel is kernels.attention
        and attention.split is kernels.split
        and mlp.swiglu is kernels.swiglu
        and attention_norm.norm is kernels.norm
        and mlp_norm.norm is kernels.norm
        and "activate" not in mlp.__dict__
        and layer.__dict__.keys().isdisjoint(_STEPS)
    )


def _is_untouched(part: nn.Module) -> bool:
    """Whether a part computes what it was written for, and nobody but its sum hears of it."""
    # Few calls of functions, which are most of the time: each layer asks its eight parts.
    kind = part.__class__
    if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind] or "forward" in part.__dict__:
        return False
    if part._forward_hooks or part._forward_pre_hooks:
        return False
    if part._backward_hooks or part._backward_pre_hooks:
        return False

    if "weight" not in part._parameters:
        return True
    weight = part._parameters["weight"]
    if weight is None or not weight.requires_grad or accumulator_of(weight) is None:
        return False
    # One hook is the gradient buffer's, which only serves gradients that autograd sums.
    return not weight._backward_hooks and len(weight._post_accumulate_grad_hooks or ()) <= 1
