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

IN_PLACE, ROUNDED = "fp32 in place", "rounded"
"""How products of weight gradients get into their fp32 sums, as the kernels line says it."""


def add_product(into: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dy^T x to `into` [rows, columns]: dy [n, rows], x [n, columns].

    No temporary where the device allows it, see `gradient_sums`.
    """
    if dy.dtype == into.dtype:
        into.addmm_(dy.t(), x)
    elif _adds_into_fp32(into.device, dy.dtype):
        _add_into_fp32(into, dy, x)
    else:
        into.add_(dy.t() @ x)


def gradient_sums(device: torch.device, dtype: torch.dtype) -> str:
    """Return how `add_product` adds products of factors of `dtype` into fp32 sums on a device.

    `IN_PLACE`, or `ROUNDED`: the product of one call is rounded to `dtype` first, as on a CPU in
    bf16. Found out once a process, at build, because it decides over bits. Raises what the device
    raises, unless that means that it cannot.
    """
    in_place = dtype == torch.float32 or _adds_into_fp32(device, dtype)
    return IN_PLACE if in_place else ROUNDED


def _add_into_fp32(into: Tensor, dy: Tensor, x: Tensor) -> None:
    torch.addmm(into, dy.t(), x, out_dtype=torch.float32, out=into)


TRIAL_ROWS, TRIAL_COLUMNS = 256, 16


@cache
def _adds_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can add a product of this dtype into an fp32 sum on this device, unrounded.

    A CPU cannot, older versions of torch and devices neither.
    """
    if device.type == "meta":
        # It stands for an accelerator that can.
        return True
    if device.type != "cuda":
        return False

    total = torch.ones(TRIAL_COLUMNS, TRIAL_COLUMNS, device=device)
    dy, x = (torch.ones(TRIAL_ROWS, TRIAL_COLUMNS, dtype=dtype, device=device) for _ in range(2))
    # The product is 257, which bf16 would round to 256.
    x[0] = 2.0
    try:
        _add_into_fp32(total, dy, x)
    except (RuntimeError, TypeError) as error:
        if not _means_unsupported(error):
            raise
        return False

    return bool((total == TRIAL_ROWS + 2).all())


def _means_unsupported(error: RuntimeError | TypeError) -> bool:
    """Whether an error says that a product cannot be added this way here, and nothing else."""
    if isinstance(error, NotImplementedError):
        return True
    words = ("out_dtype",) if isinstance(error, TypeError) else ("NOT_SUPPORTED", "out_dtype")
    return any(word in str(error) for word in words)


class GradAccumulator:
    """Running fp32 sum of one parameter's gradient over the micro-batches of a step.

    `total` has the parameter's shape and is contiguous. `arrived` is called once per micro-batch,
    when its gradient is complete.
    """

    def __init__(self, total: Tensor, arrived: Callable[[], None] | None = None):
        self.total, self.arrived = total, arrived

    def add(self, gradient: Tensor, first_row: int = 0) -> None:
        """Add a gradient [rows, ...] to the rows from `first_row`."""
        rows = gradient.shape[0]
        whole = rows == self.total.shape[0]
        (self.total if whole else self.total.narrow(0, first_row, rows)).add_(gradient)

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


def accumulated(parameter: Tensor, gradient: Tensor) -> Tensor | None:
    """Add a whole gradient to the parameter's accumulator, where it has one.

    Returns what is left for autograd. Through autograd's own sum the same gradient would be copied
    once and come back by a hook.
    """
    accumulator = accumulator_of(parameter)
    if accumulator is None:
        return gradient
    accumulator.add(gradient)
    accumulator.complete()
    return None


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
