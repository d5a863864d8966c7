"""Where weight gradients go: summed straight into fp32, at once or when the schedule asks for them.

A matrix's gradient is a product of what came in and what came back, so it needs no tensor of its own: the product is
added into the parameter's fp32 sum (`GradAccumulator`), and autograd hears of no weight gradient. Whether it is done inside the
backward pass or kept for a later action of a zero-bubble schedule is the stage's `WeightGradStore` to say; a layer only hands
over what there is to do. Refused: autograd's own accumulation (a tensor in the weights' dtype a micro-batch, then an
addition), and two backward passes over one graph (everything up to the matrices would be computed twice).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn


def add_product(into: Tensor, dy: Tensor, x: Tensor) -> None:
    """into [rows, columns] += dy^T x: dy [n, rows], x [n, columns]. Without a tensor between, where the device can.

    A CPU has no product of bf16 factors that adds into fp32: there the product of one call is rounded to bf16 first.
    """
    if dy.dtype == into.dtype:
        into.addmm_(dy.t(), x)
    elif _adds_into_fp32(into.device, dy.dtype):
        torch.addmm(into, dy.t(), x, out_dtype=torch.float32, out=into)
    else:
        into.add_(dy.t() @ x)


@cache
def _adds_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies factors of this dtype into an fp32 sum on this device; older versions want one dtype."""
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
    """The running sum of one parameter's gradient over the micro-batches of a step.

    `total` has the parameter's shape, fp32, contiguous. `arrived` is called once a micro-batch, when all of it is in.
    """

    def __init__(self, total: Tensor, arrived: Callable[[], None] | None = None):
        self.total, self.arrived = total, arrived

    def add(self, gradient: Tensor, first_row: int = 0) -> None:
        """Add a gradient [rows, ...] to the rows from `first_row`."""
        self.total.narrow(0, first_row, gradient.shape[0]).add_(gradient)

    def add_product(self, dy: Tensor, x: Tensor, first_row: int = 0) -> None:
        """Add dy^T x to the rows from `first_row`: dy [n, rows], x [n, columns], in the parameters' dtype."""
        add_product(self.total.narrow(0, first_row, dy.shape[1]), dy, x)

    def complete(self) -> None:
        """This micro-batch's part is in."""
        if self.arrived is not None:
            self.arrived()


def attach(parameter: nn.Parameter, accumulator: GradAccumulator) -> None:
    """Make `accumulator` the place where this parameter's gradient is summed."""
    parameter.accumulator = accumulator


def accumulator_of(parameter: Tensor) -> GradAccumulator | None:
    """The parameter's sink; None where none is attached, and its gradient goes to autograd."""
    return getattr(parameter, "accumulator", None)


class WeightGradStore:
    """The weight gradients of one stage: done where they are handed over, or kept for later."""

    def __init__(self) -> None:
        self._deferred: list[Callable[[], None]] | None = None

    @property
    def is_deferring(self) -> bool:
        """Whether what is handed over now is done later."""
        return self._deferred is not None

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` now, or keep it, with the tensors it holds, while `deferring`."""
        if self._deferred is None:
            work()
        else:
            # Later is outside the backward pass, where nothing switches the recording of gradients off.
            self._deferred.append(torch.no_grad()(work))

    @contextmanager
    def deferring(self) -> Iterator[list[Callable[[], None]]]:
        """Keep what is handed over inside; whoever takes the list runs it once, in its order."""
        assert self._deferred is None, "a backward pass began inside another one of the same stage"
        self._deferred = []
        try:
            yield self._deferred
        finally:
            self._deferred = None
