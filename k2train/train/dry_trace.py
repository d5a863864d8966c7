"""Trace of a step on meta tensors: live bytes by kind, FLOPs, and every collective.

- A dispatch mode sees each operation of torch, also those of autograd and of the optimizer. It
  counts the storages that come and go, and what products and attention cost.
- Collectives and transfers are recorded and not done: nothing is sent, and no result is waited for.
- The convention of FLOPs is that of `plan.cost`: a multiply-add is 2, attention is counted as full,
  what its kernel computes again is not counted.

Alternatives considered:
- FakeTensor on a CUDA device: its autograd needs a CUDA build of torch.
- torch's MemTracker: it knows modules, and neither pipeline actions nor flat shards.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "baddbmm": (1, 2)}
"""Places of the factors among the arguments of each product."""
ATTENTION = {
    "_scaled_dot_product_flash_attention": (0, 1, 4),
    "_scaled_dot_product_flash_attention_backward": (1, 2, 8),
}
"""Places of query and key, and FLOPs for each element of the query and key position."""
KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": "receive",
    "barrier": "barrier",
}
"""Names of torch's distributed operations, and how they are called here."""
WORKING, KEPT, TRANSFER = "working set", "activations", "in transfer"


@dataclass(frozen=True)
class Transfer:
    """A collective, or one end of a transfer between two ranks."""

    kind: str
    axis: str
    num_bytes: int
    """Bytes of its largest tensor on this rank."""
    peer: int | None = None
    """Rank in the axis that is sent to or received from."""
    during: str = ""
    """Operation of the pipeline program, such as `FORWARD`, or phase of the step."""


class StepTrace(TorchDispatchMode):
    """A context: what is computed inside is traced.

    `axes` names process groups by the axis they serve. Storages are counted under the kind
    `WORKING` until `mark` gives them another.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.axes = dict(axes)
        self.transfers: list[Transfer] = []
        self.during = ""
        """What transfers are recorded under from here on."""
        self.flops: Counter[str] = Counter()
        self.live: Counter[str] = Counter()
        """Bytes of the storages that exist, by kind."""
        self.live_bytes = 0
        self.peak_bytes, self.at_peak = 0, dict[str, int]()
        """Most bytes at once since `restart`, and what they were."""
        self._held: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        done = torch.futures.Future[list[Tensor]]()
        done.set_result([])
        make: Any = c10d.__dict__["_create_work_from_future"]
        self._done = make(done).boxed()
        """A finished work. That of the fake process group never says that it is."""

    def restart(self) -> None:
        """Forget the peak so far, the FLOPs and the transfers; what exists is counted on."""
        self.peak_bytes, self.at_peak = self.live_bytes, dict(self.live)
        self.flops.clear()
        self.transfers.clear()

    def mark(self, kind: str, tensors: Iterable[Tensor] | None = None) -> None:
        """Count tensors under another kind; None: all of the working set."""
        if tensors is None:
            keys = [key for key, held in self._held.items() if held[2] == WORKING]
        else:
            keys = [tensor.untyped_storage()._cdata for tensor in tensors]
        for key in keys:
            reference, size, old = self._held[key]
            self._held[key] = reference, size, kind
            self.live[old] -= size
            self.live[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            return self._record(func, args)

        out = func(*args, **(kwargs or {}))
        self._count(func._overloadpacket.__name__, args)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._hold(leaf)
        return out

    def _count(self, name: str, args: Any) -> None:
        if name in FACTORS:
            first, second = (args[place] for place in FACTORS[name])
            self.flops["products"] += 2 * first.numel() * second.shape[-1]
        elif name in ATTENTION:
            query, key, flops = ATTENTION[name]
            self.flops["attention"] += flops * args[query].numel() * args[key].shape[2]

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return

        def gone(_: object) -> None:
            _, _, kind = self._held.pop(key)
            self.live[kind] -= size
            self.live_bytes -= size

        self._held[key] = weakref.ref(storage, gone), size, WORKING
        self.live[WORKING] += size
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.at_peak = self.live_bytes, dict(self.live)

    def _record(self, func: Any, args: Any) -> Any:
        """Record a collective and return what it would: its output tensors, and a finished work."""
        name = func._overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        axis = self._axis(args)
        peer = args[2] if name in ("send", "recv_") else None
        largest = max((tensor.nbytes for tensor in tensors), default=0)
        self.transfers.append(Transfer(KINDS.get(name, name), axis, largest, peer, self.during))

        out = tuple(
            self._done if "Work" in str(value.type) else args[0] for value in func._schema.returns
        )
        return out[0] if len(out) == 1 else out

    def _axis(self, args: Any) -> str:
        """Name of the axis whose process group is among the arguments."""
        for value in args:
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
                name = dist.ProcessGroup.unbox(value).group_name
                return self.axes.get(name, "all ranks")
        raise AssertionError("a collective without a process group")
