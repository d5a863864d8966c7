"""Injection of value faults into gradients, losses, weights and optimizer moments.

- Imitates what broken memory or a broken product leaves behind:

      gradient@rank=1@step=4:nan=layers.0.mlp.gate.weight   nan, inf or huge (1e30), first element
      loss@step=4@nth=2:nan                                 the second micro-batch of the step
      weight@rank=1@step=5:flip=norm.weight                 one bit of a parameter
      moment@rank=0@step=5:flip=head.weight.exp_avg         one bit of a flat shard (`.master` too)

- Without a tensor name the fault hits the first tensor of the rank.
- Does nothing unless a fault is armed; see `k2train.fault_injection` for the syntax.
"""

import torch
from torch import Tensor

from k2train import fault_injection
from k2train.optim.adamw import ShardedAdamW
from k2train.parallel.grad_accumulation import accumulator_of
from k2train.parallel.shard_layout import BufferSlot, ShardLayout

VALUES = {"nan": float("nan"), "inf": float("inf"), "huge": 1e30}


@torch.no_grad()
def inject_gradient_fault(table: ShardLayout) -> None:
    """Corrupt a gradient if asked to; called after the backward passes, before the reduction."""
    if (fault := fault_injection.find("gradient")) is not None:
        slot = _slot(table, fault.argument)
        accumulator = accumulator_of(slot.parameter)
        assert accumulator is not None, f"{slot.param_slice.name} has no sum"
        slot.param_slice.of(accumulator.total).view(-1)[0] = VALUES[fault.action]


@torch.no_grad()
def inject_state_fault(optimizer: ShardedAdamW) -> None:
    """Flip a bit of a weight or a moment if asked to; called between two steps."""
    if (fault := fault_injection.find("weight")) is not None:
        slot = _slot(optimizer.shard_layout, fault.argument)
        _flip(slot.param_slice.of(slot.parameter.data))

    if (fault := fault_injection.find("moment")) is not None:
        name, _, state = fault.argument.rpartition(".")
        _flip(optimizer.view(state or "exp_avg", _slot(optimizer.shard_layout, name)))


def inject_output_fault(hidden: Tensor) -> Tensor:
    """Return the last stage's output of one micro-batch, corrupted if asked to."""
    fault = fault_injection.find("loss")
    return hidden if fault is None else hidden * VALUES[fault.action]


def _slot(table: ShardLayout, name: str) -> BufferSlot:
    return next((slot for slot in table.slots if slot.param_slice.name == name), table.slots[0])


def _flip(values: Tensor) -> None:
    """Flip a bit of the mantissa of the first element."""
    dtype, bit = (torch.int16, 1 << 5) if values.element_size() == 2 else (torch.int32, 1 << 20)
    values.view(-1)[:1].view(dtype).bitwise_xor_(bit)
