"""What a layer keeps for its backward pass: everything, the results of its products, or only its input.

    none        everything that a backward formula asks for
    selective   not the outputs of the norms nor that of the SwiGLU: each is made again by one pass over what is kept anyway
    full        the layer's input; all up to the last product's input is computed again, collectives included

What a backward formula asks for is answered with the tensor kept or with one computed again by the same functions from
the same numbers, so no bit changes; there is no dropout, so no random state is kept. Korthikanti et al. 2022
(arXiv:2205.05198, section 4.1) computes the core of attention again instead: with kernels that keep no scores, as most
here, there is nothing to save in it.

Refused: `torch.utils.checkpoint`, which runs the whole layer again. The last product, a fifth of a layer, and the
collective behind it serve no backward formula; but a function of our own saves its inputs only after it ran, so that the
early stop there comes too late.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

POLICIES = ("none", "selective", "full")

Cheap = Callable[[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor]], Tensor]
"""`cheap(function, x, use)` is `use(function(x))`, where the function's output need not be kept for the backward pass."""


class Layer(Protocol):
    """A layer in two parts: all up to its last product's input, and that product."""

    def inner(self, x: Tensor, cheap: Cheap, *args: Any) -> tuple[Tensor, Tensor]:
        """x -> (what the last product's result is added to, what its input is computed from by `activate`)."""

    def activate(self, x: Tensor) -> Tensor:
        """The last product's input."""

    def outer(self, residual: Tensor, x: Tensor) -> Tensor:
        """The last product and what it is added to."""


def run_layer(layer: Layer, x: Tensor, policy: str, *args: Any) -> Tensor:
    """Apply a layer to x under a policy of `POLICIES`; where autograd is off nothing is kept, whatever the policy."""
    assert policy in POLICIES, f"the recompute policy {policy!r} is none of {POLICIES}"
    if policy == "none":
        residual, inner = layer.inner(x, _keep, *args)
        return layer.outer(residual, layer.activate(inner))
    if policy == "selective":
        residual, inner = layer.inner(x, _recompute, *args)
        return _recompute(layer.activate, inner, lambda active: layer.outer(residual, active))

    def front(x: Tensor) -> tuple[Tensor, Tensor]:
        residual, inner = layer.inner(x, _keep, *args)
        return residual, layer.activate(inner)

    call = _RecomputedCall(front, x)
    residual, active = call.run()
    with recomputed(active, call.last):
        return layer.outer(residual, active)


def _keep(
    function: Callable[[Tensor], Tensor], x: Tensor, use: Callable[[Tensor], Tensor]
) -> Tensor:
    return use(function(x))


def _recompute(
    function: Callable[[Tensor], Tensor], x: Tensor, use: Callable[[Tensor], Tensor]
) -> Tensor:
    y, source = function(x), x.detach().requires_grad_(x.requires_grad)

    def make() -> Tensor:
        # With gradients on, as it was called first: compiled, it would be another function without.
        with torch.enable_grad():
            return function(source)

    with recomputed(y, make):
        return use(y)


class _Recomputed:
    """Stands for a saved tensor; `make` gives the memory that it was a view of, with the bits it had."""

    def __init__(self, saved: Tensor, make: Callable[[], Tensor]):
        self._make, self._shape, self._stride, self._offset = (
            make,
            saved.shape,
            saved.stride(),
            saved.storage_offset(),
        )

    def get(self) -> Tensor:
        return self._make().detach().as_strided(self._shape, self._stride, self._offset)


@contextmanager
def recomputed(made: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, autograd keeps nothing of `made`, a tensor with memory of its own: it asks `make()` for it when it needs it.

    `make` returns the same bits in the same order of memory and must not hold `made`.
    """
    memory = _memory(made)

    def pack(saved: Tensor) -> Any:
        return _Recomputed(saved, make) if _memory(saved) == memory else saved

    def unpack(packed: Any) -> Tensor:
        return packed.get() if isinstance(packed, _Recomputed) else packed

    with saved_tensors_hooks(pack, unpack):
        yield


def _memory(tensor: Tensor) -> int:
    """Names the memory of a tensor, its views included."""
    return int(tensor.untyped_storage()._cdata)


class _SavedHandle:
    """Stands for one of the tensors that a call saved."""


class _RecomputedCall:
    """A call that keeps only its input: what autograd saves of it is computed again when the first of it is asked for."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor):
        self._function, self._x = function, x
        self._handles: list[ref[_SavedHandle]] = []
        # Each value is dropped with its place, which autograd does as it goes: a layer's backward frees what it has used.
        self._values: WeakKeyDictionary[_SavedHandle, Tensor] = WeakKeyDictionary()
        self._done = False
        self._last: Tensor | None = None

    def run(self) -> tuple[Tensor, Tensor]:
        with saved_tensors_hooks(self._pack, self._unpack):
            return self._function(self._x)

    def last(self) -> Tensor:
        """The second output, once: whoever asks is the only one who needs it."""
        self._compute()
        assert self._last is not None, "the last product's input was asked for twice"
        last, self._last = self._last, None
        return last

    def _pack(self, saved: Tensor) -> _SavedHandle:
        handle = _SavedHandle()
        self._handles.append(ref(handle))
        return handle

    def _unpack(self, handle: _SavedHandle) -> Tensor:
        self._compute()
        return self._values[handle]

    def _compute(self) -> None:
        if self._done:
            return
        saved: list[Tensor] = []
        x = self._x.detach().requires_grad_(self._x.requires_grad)
        with (
            torch.enable_grad(),
            saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), _never),
        ):
            self._last = self._function(x)[1].detach()
        assert len(saved) == len(self._handles), (
            f"{len(self._handles)} tensors were saved, then {len(saved)}"
        )
        for handle, value in zip(self._handles, saved, strict=True):
            live = handle()
            if live is not None:
                self._values[live] = value
        self._done = True


def _never(packed: Any) -> Tensor:
    raise AssertionError("nothing runs backward through what was computed again")
