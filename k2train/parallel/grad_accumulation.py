"""fp32 gradient accumulation: weight gradients added into fp32 sums, at once or deferred.

- A matrix's gradient is a product of its input and its output gradient. The product is added into
  the parameter's fp32 sum (`GradAccumulator`), so autograd sees no weight gradient and no tensor of
  its own is needed.
- The stage's `WeightGradStore` decides whether that runs inside the backward pass or in a later
  action of a zero-bubble schedule. A layer only submits the work.

Alternatives considered:
- autograd's own accumulation: one tensor in the weights' dtype per micro-batch, then an addition.
- Two backward passes over one graph: everything up to the matrices would be computed twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn


def add_product(into: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dy^T x to `into` [rows, columns]: dy [n, rows], x [n, columns].

    No temporary where the device allows it.

    A CPU cannot add a product of bf16 factors into fp32. There the product of one call is rounded
    to bf16 first.
    """
    if dy.dtype == into.dtype:
        into.addmm_(dy.t(), x)
    elif _adds_into_fp32(into.device, dy.dtype):
        torch.addmm(into, dy.t(), x, out_dtype=torch.float32, out=into)
    else:
        into.add_(dy.t() @ x)


@cache
def _adds_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can add a product of this dtype into an fp32 sum on this device.

    Older versions need one dtype.
    """
    if device.type == "cpu":
        return False
    total, factor = (
        torch.ones(16, 16, device=device),
        torch.ones(16, 16, dtype=dtype, device=device),
    )
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False

    return True


class GradAccumulator:
    """Running fp32 sum of one parameter's gradient over the micro-batches of a step.

    `total` has the parameter's shape and is contiguous. `arrived` is called once per micro-batch,
    when its gradient is complete.
    """

    def __init__(self, total: Tensor, arrived: Callable[[], None] | None = None):
        self.total, self.arrived = total, arrived

    def add(self, gradient: Tensor, first_row: int = 0) -> None:
        """Add a gradient [rows, ...] to the rows from `first_row`."""
        self.total.narrow(0, first_row, gradient.shape[0]).add_(gradient)

    def add_product(self, dy: Tensor, x: Tensor, first_row: int = 0) -> None:
        """Add dy^T x to the rows from `first_row`: dy [n, rows], x [n, columns]."""
        add_product(self.total.narrow(0, first_row, dy.shape[1]), dy, x)

    def complete(self) -> None:
        """Mark this micro-batch's gradient as complete."""
        if self.arrived is not None:
            self.arrived()


def attach(parameter: nn.Parameter, accumulator: GradAccumulator) -> None:
    """Sum this parameter's gradient in `accumulator` from now on."""
    parameter.accumulator = accumulator


def accumulator_of(parameter: Tensor) -> GradAccumulator | None:
    """Return the parameter's accumulator. None: its gradient goes to autograd."""
    return getattr(parameter, "accumulator", None)


class WeightGradStore:
    """Weight gradients of one stage: run as they are submitted, or deferred."""

    def __init__(self) -> None:
        self._deferred: list[Callable[[], None]] | None = None

    @property
    def is_deferring(self) -> bool:
        """Whether submitted work is deferred at the moment."""
        return self._deferred is not None

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` now, or keep it and its tensors while `deferring`."""
        if self._deferred is None:
            work()
        else:
            # Deferred work runs outside the backward pass, where gradients would be recorded.
            self._deferred.append(torch.no_grad()(work))

    @contextmanager
    def deferring(self) -> Iterator[list[Callable[[], None]]]:
        """Defer work submitted inside this context. The caller runs the list once, in its order."""
        assert self._deferred is None, "a backward pass began inside another one of the same stage"
        self._deferred = []
        try:
            yield self._deferred
        finally:
            self._deferred = None
