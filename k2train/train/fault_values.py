"""Injection of value faults into gradients, losses, weights and optimizer moments.

- Imitates what broken memory or a broken product leaves behind:

      gradient@rank=1@step=4:nan=layers.0.mlp.gate.weight   nan, inf or huge (1e30), first element
      loss@step=4@nth=2:nan                                 the second micro-batch of the step
      weight@rank=1@step=5:flip=norm.weight                 one bit of a parameter
      moment@rank=0@step=5:flip=head.weight.exp_avg         one bit of a flat shard (`.master` too)

- Each value changes when it is complete and before it is used, also where transfers overlap: a
  gradient before its bucket is sent, a weight once the gather of the last update has arrived.
- Without a tensor name the fault hits the first tensor of the rank. A tensor that this rank does
  not hold is not hit.
- Does nothing unless a fault is armed; see `k2train.fault_injection` for the syntax.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from k2train import fault_injection
from k2train.optim.adamw import ShardedAdamW
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.parallel.grad_buffer import GradientBuffer
from k2train.parallel.shard_layout import BufferSlot, ShardLayout

VALUES = {"nan": float("nan"), "inf": float("inf"), "huge": 1e30}


def inject_gradient_fault(gradients: GradientBuffer) -> None:
    """Corrupt a gradient of this step if asked to; called before the step's first backward pass.

    It strikes once the gradient is complete, before anything of it is sent.
    """
    fault = fault_injection.find("gradient")
    slot = None if fault is None else _slot(gradients.shard_layout, fault.argument)
    if fault is None or slot is None:
        gradients.before_reduction = _unchanged
        return

    # A partial function and not a method: nothing refers back to the engine.
    gradients.before_reduction = partial(_strike_gradient, slot, VALUES[fault.action])


def _unchanged(complete: Sequence[BufferSlot]) -> None:
    """Leave the gradients as they are."""


@torch.no_grad()
def _strike_gradient(slot: BufferSlot, value: float, complete: Sequence[BufferSlot]) -> None:
    if any(one is slot for one in complete):
        accumulator = accumulator_of(slot.parameter)
        assert accumulator is not None, f"{slot.param_slice.name} has no sum"
        slot.param_slice.of(accumulator.total).view(-1)[0] = value
        fault_injection.value_changed("gradient")


@torch.no_grad()
def inject_state_fault(optimizer: ShardedAdamW) -> None:
    """Flip a bit of a weight or a moment if asked to; called between two steps."""
    if (fault := fault_injection.find("weight")) is not None:
        # What still arrives from the last update would write over the flipped bit.
        optimizer.finish()
        if (slot := _slot(optimizer.shard_layout, fault.argument)) is not None:
            _flip(slot.param_slice.of(slot.parameter.data))
            fault_injection.value_changed("weight")

    if (fault := fault_injection.find("moment")) is not None:
        name, _, state = fault.argument.rpartition(".")
        if (slot := _slot(optimizer.shard_layout, name)) is not None:
            _flip(optimizer.view(state or "exp_avg", slot))
            fault_injection.value_changed("moment")


def inject_output_fault(hidden: Tensor) -> Tensor:
    """Return the last stage's output of one micro-batch, corrupted if asked to."""
    fault = fault_injection.find("loss")
    if fault is None:
        return hidden
    fault_injection.value_changed("loss")
    return hidden * VALUES[fault.action]


def _slot(layout: ShardLayout, name: str) -> BufferSlot | None:
    """Return the slot of a tensor, the first one for "", None for one this rank does not hold."""
    return next((slot for slot in layout.slots if name in ("", slot.param_slice.name)), None)


def _flip(values: Tensor) -> None:
    """Flip a bit of the mantissa of the first element."""
    dtype, bit = (torch.int16, 1 << 5) if values.element_size() == 2 else (torch.int32, 1 << 20)
    values.view(-1)[:1].view(dtype).bitwise_xor_(bit)
