"""Activation recomputation: what a layer keeps for its backward pass.

    none        everything that a backward formula needs
    selective   not the outputs of the norms and the SwiGLU, one pass over kept tensors each
    full        only the layer's input

- With full everything up to the last product's input is computed again, collectives included.
- A backward formula gets the kept tensor, or one computed again by the same functions from the same
  numbers. So no bit changes. There is no dropout, so no random state is kept.
- Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) recomputes the core of attention. Most
  kernels here keep no scores, so there is nothing to save.

Alternatives considered:
- `torch.utils.checkpoint`: runs the whole layer again. The last product, a fifth of a layer, and
  its collective serve no backward formula. A custom autograd function saves its inputs only after
  it ran, so the early stop comes too late.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

POLICIES = ("none", "selective", "full")


class Cheap(Protocol):
    """`cheap(function, x, use)` is `use(function(x))`, whose middle the backward may compute again.

    `y` is the middle, where another function has made it together with x.
    """

    def __call__(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        use: Callable[[Tensor], Tensor],
        y: Tensor | None = None,
    ) -> Tensor: ...


class Layer(Protocol):
    """A layer in two parts: everything up to its last product's input, and that product."""

    def inner(self, x: Tensor, cheap: Cheap, *args: Any) -> tuple[Tensor, Tensor]:
        """Map x -> (residual that the last product is added to, input of `activate`)."""

    def activate(self, x: Tensor) -> Tensor:
        """Compute the last product's input."""

    def outer(self, residual: Tensor, x: Tensor) -> Tensor:
        """Compute the last product and add it to the residual."""


def run_layer(layer: Layer, x: Tensor, policy: str, *args: Any) -> Tensor:
    """Apply a layer to x under a policy of `POLICIES`.

    Without autograd nothing is kept, whatever the policy.
    """
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
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    use: Callable[[Tensor], Tensor],
    y: Tensor | None = None,
) -> Tensor:
    return use(function(x) if y is None else y)


def _recompute(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    use: Callable[[Tensor], Tensor],
    y: Tensor | None = None,
) -> Tensor:
    y = function(x) if y is None else y
    source = x.detach().requires_grad_(x.requires_grad)

    def make() -> Tensor:
        # With gradients on, as it was called first: compiled, it would be another function without.
        with torch.enable_grad():
            return function(source)

    with recomputed(y, make):
        return use(y)


class _Recomputed:
    """Placeholder for a saved tensor.

    `make` returns the memory that it was a view of, with the same bits.
    """

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
    """Context in which autograd does not keep `made`, but calls `make()` when needed.

    `made` has memory of its own. `make` returns the same bits in the same memory order and must not
    hold `made`.
    """
    memory = _memory(made)

    def pack(saved: Tensor) -> Any:
        return _Recomputed(saved, make) if _memory(saved) == memory else saved

    def unpack(packed: Any) -> Tensor:
        return packed.get() if isinstance(packed, _Recomputed) else packed

    with saved_tensors_hooks(pack, unpack):
        yield


def _memory(tensor: Tensor) -> int:
    """Identity of a tensor's memory, shared by its views."""
    return int(tensor.untyped_storage()._cdata)


class _SavedHandle:
    """Placeholder for one of the tensors that a call saved."""


class _RecomputedCall:
    """A call that keeps only its input.

    It runs again when autograd first needs one of its saved tensors.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor):
        self._function, self._x = function, x
        self._handles: list[ref[_SavedHandle]] = []
        # Autograd drops each handle after its use, and its value with it: the backward of a layer
        # frees what it has used.
        self._values: WeakKeyDictionary[_SavedHandle, Tensor] = WeakKeyDictionary()
        self._done = False
        self._last: Tensor | None = None

    def run(self) -> tuple[Tensor, Tensor]:
        with saved_tensors_hooks(self._pack, self._unpack):
            return self._function(self._x)

    def last(self) -> Tensor:
        """Return the second output and release it (single consumer)."""
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

        # The same function saves the same tensors in the same order.
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
