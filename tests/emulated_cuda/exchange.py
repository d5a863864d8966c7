"""Collectives on CUDA tensors, over gloo and in host memory, with NCCL's asynchrony made visible.

- gloo works on copies. What a collective will write is NaN until `wait`, so whoever uses it before
  has NaN; on a GPU he would have what happens to be there.
- What a collective reads must be the same at `wait` as it was at the start, or `wait` raises
  RuntimeError: NCCL reads it at a time of its own.
- Memory is kept until then, as NCCL's process group does.

Alternatives considered:
- gloo on the tensors' own memory: a small collective has ended before anybody looks, so nearly
  every missing wait goes unseen.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work

from tests.emulated_cuda.memory import leaves, on_cpu

WRITTEN_AND_READ: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "c10d::allreduce_": ((0,), (0,)),
    "c10d::broadcast_": ((0,), (0,)),
    "c10d::_allgather_base_": ((0,), (1,)),
    "c10d::_reduce_scatter_base_": ((0,), (1,)),
    "c10d::alltoall_base_": ((0,), (1,)),
    "c10d::send": ((), (0,)),
    "c10d::recv_": ((0,), ()),
}
"""Operation -> places of the arguments that it writes, and that it reads."""
UNDER_WAY: "list[LateWork]" = []


class LateWork(Work):
    """A collective whose result is in its tensors after `wait`, and not before."""

    def __init__(
        self,
        name: str,
        work: Work,
        results: Sequence[tuple[Tensor, Tensor]],
        inputs: Sequence[tuple[Tensor, Tensor]],
    ):
        super().__init__()
        self._name, self._work, self._results, self._inputs = (
            name,
            work,
            results,
            inputs,
        )
        self._waited = False

    def wait(self, *limit: Any) -> bool:
        """Wait for the end; the results appear. Raises RuntimeError for inputs that changed."""
        done = bool(self._work.wait(*limit))
        if not self._waited:
            self._waited = True
            for tensor, copy in self._inputs:
                if not _same_bytes(on_cpu(tensor), copy):
                    raise RuntimeError(
                        f"{self._name}: its input was written while it was under way"
                    )
            for tensor, copy in self._results:
                on_cpu(tensor).copy_(copy)
            self._results = self._inputs = ()
        return done

    def is_completed(self) -> bool:
        """Whether it has ended; its results still appear at `wait`."""
        return bool(self._work.is_completed())

    @property
    def is_over(self) -> bool:
        """Whether nobody needs it any more: waited for, or a send that has ended."""
        return self._waited or (not self._results and self.is_completed())


def exchange(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do what a c10d operation does, with tensors of a CUDA device; None for one not known."""
    name = func._schema.name
    if name not in WRITTEN_AND_READ:
        return None

    written, read = (
        [x for place in places for x in leaves(args[place]) if isinstance(x, Tensor)]
        for places in WRITTEN_AND_READ[name]
    )
    copies = {id(x): on_cpu(x).clone() for x in (*written, *read)}
    untouched = [x for x in read if not any(x is other for other in written)]
    inputs = [(x, copies[id(x)].clone()) for x in untouched]

    def copied(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(copied(part) for part in x)
        return copies.get(id(x), x) if isinstance(x, Tensor) else x

    found = func(*(copied(x) for x in args), **kwargs)
    for x in written:
        _poison(on_cpu(x))
    for x, before in inputs:
        # A gather whose input is a part of its output.
        on_cpu(x).copy_(before)
    shared = {x.untyped_storage().data_ptr() for x in written}
    checked = [(x, old) for x, old in inputs if x.untyped_storage().data_ptr() not in shared]

    whole = isinstance(found, tuple)
    work = LateWork(
        name,
        Work.unbox(found[-1] if whole else found),
        [(x, copies[id(x)]) for x in written],
        checked,
    )
    UNDER_WAY[:] = [other for other in UNDER_WAY if not other.is_over]
    UNDER_WAY.append(work)
    return (args[0], work.boxed()) if whole else work.boxed()


def _poison(tensor: Tensor) -> None:
    """Fill with NaN, or with -1 where there is none."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else -1)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits: NaN equals NaN."""
    return bool(torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (one, other))))
