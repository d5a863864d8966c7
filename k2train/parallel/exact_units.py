"""A micro-batch computed in units of a fixed number of sequences, forward and backward.

- The bits of a matrix product depend on its shape: a bf16 product of 512 rows differs from two of
  256 rows on a CPU. A unit has the same shape in every layout, so its bits are the same.
- Units run one after another, in their order, forward and backward. Each adds its weight gradients
  by itself. What crosses a stage border is still the whole micro-batch.
- Each unit's input is a tensor of its own, and so is its output's gradient: a strided view could
  take another kernel.

Alternatives considered:
- A slice of the micro-batch for autograd to split: it runs the last unit's backward first.
- Micro-batches of one unit: a schedule, and the number of its transfers, would not be what
  `batch.micro_sequences` says.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]


class _Units(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, calls: Sequence[Call], join: Callable[..., Tensor]
    ) -> Tensor:
        ctx.inputs = [
            part.detach().requires_grad_(part.is_floating_point()) for part in _parts(x, calls)
        ]
        with torch.enable_grad():
            ctx.outputs = [call(part) for call, part in zip(calls, ctx.inputs, strict=True)]
        return join([output.detach() for output in ctx.outputs])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None, None]:
        inputs, outputs = ctx.inputs, ctx.outputs
        # Freed unit by unit: a backward pass must not keep what the others need.
        ctx.inputs, ctx.outputs = [], []
        outputs.reverse()
        scalar, width = not dy.ndim, 0 if not dy.ndim else dy.shape[1] // len(inputs)

        for number in range(len(inputs)):
            part = dy if scalar else dy.narrow(1, number * width, width).contiguous()
            torch.autograd.backward(outputs.pop(), part)

        if not inputs[0].requires_grad:
            return None, None, None, None
        return None, torch.cat([part.grad for part in inputs], dim=1), None, None


def _parts(x: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    """Cut token ids [b, s] or activations [s, b, h] along b into one tensor for each call."""
    dim = 1 if x.is_floating_point() else 0
    return [part.contiguous() for part in x.detach().chunk(len(calls), dim=dim)]


def _join_sequences(outputs: list[Tensor]) -> Tensor:
    return torch.cat(outputs, dim=1)


def _join_losses(outputs: list[Tensor]) -> Tensor:
    return torch.stack(outputs).sum()


def run_in_units(x: Tensor, calls: Sequence[Call]) -> Tensor:
    """Apply one call to each unit of x, [b, s] or [s, b, h]; return the outputs as [s, b, h]."""
    return _run(x, calls, _join_sequences)


def losses_in_units(hidden: Tensor, calls: Sequence[Call]) -> Tensor:
    """Apply one call to each unit of `hidden` [s, b, h]; return the sum of their scalars.

    The gradient of each is that of the sum.
    """
    return _run(hidden, calls, _join_losses)


def _run(x: Tensor, calls: Sequence[Call], join: Callable[..., Tensor]) -> Tensor:
    if len(calls) == 1:
        return calls[0](x)
    if not torch.is_grad_enabled():
        return join([call(part) for call, part in zip(calls, _parts(x, calls), strict=True)])

    # Token ids have no gradient, and autograd calls a backward only where one input has.
    anchor = torch.empty(0, device=x.device, requires_grad=True)
    return _Units.apply(anchor, x, calls, join)
