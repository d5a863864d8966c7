"""Dispatch mode that computes CUDA operations on the CPU, and notes where the host waits.

- An operation on CUDA tensors runs on CPU tensors over the same memory; results get device memory.
- An operator of torch that is Python inside runs as it is, and what it calls is emulated.
- Views and allocations run natively, so torch's own allocator and stream bookkeeping are used.
- CPU and CUDA tensors in one operation raise RuntimeError, as on a GPU. A CPU scalar is allowed.
- A *wait* is where the host stops until the device has done all that was queued: reading a value,
  a copy between host and device that is not asynchronous, synchronizing a stream. Each is noted
  with the line of `k2train` that caused it.
- Collectives on CUDA tensors go over the group's gloo half, see `exchange`.
"""

import atexit
import ctypes
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from linecache import getline
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import k2train
from tests.emulated_cuda.exchange import exchange
from tests.emulated_cuda.kernels import TWINS, aten
from tests.emulated_cuda.libraries import load
from tests.emulated_cuda.memory import CPU, leaves, mapped, on_cpu, on_device

PACKAGE = str(Path(k2train.__file__).parent)

NATIVE = {
    aten._fused_sdp_choice.default,
    aten._unsafe_view.default,
    aten.detach.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.is_pinned.default,
    aten.lift_fresh.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.record_stream.default,
    aten.resize_.default,
    torch.ops.prim.device.default,
}
"""Operations that need no kernel, and no copy, on a device."""
IN_PYTHON = "torch_attn"
"""Namespace of the operators that torch has written in Python, of operations that are emulated."""
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
READS = (
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique",
)
"""Operations that read a value, or the size of their result, on the host."""
INDEXED = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}
"""A mask as index is counted on the host. An index in host memory is copied to the device."""
WHOLE_NUMBER_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
"""No kernel of a GPU multiplies matrices of integers."""


class Journal:
    """What the emulation has seen in this process."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        """`KIND at FILE:LINE CODE` -> number, of every wait of the host."""
        self.operations: Counter[str] = Counter()

    def wait(self, kind: str) -> None:
        """Note a wait of the host."""
        self.waits[f"{kind} at {place()}"] += 1


JOURNAL = Journal()


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Collect the waits of the host inside the context."""
    before, found = Counter(JOURNAL.waits), Counter[str]()
    yield found
    found.update(JOURNAL.waits - before)


def place() -> str:
    """Return the innermost line of `k2train` on the stack, as `FILE:LINE CODE`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            code = getline(name, frame.f_lineno).strip()
            return f"{name[len(PACKAGE) + 1 :]}:{frame.f_lineno} {code}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside of k2train"


@cache
def _is_native(func: Any) -> bool:
    """Whether an operation only looks at memory in another way, or needs no kernel."""
    returned = [value.alias_info for value in func._schema.returns]
    return func in NATIVE or any(one is not None and not one.is_write for one in returned)


class EmulatedCuda(TorchDispatchMode):
    """The mode; entered by `install` in every thread."""

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.Generator, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = next((x.device for x in tensors if x.is_cuda), None)
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if device is None and (asked is None or asked.type != "cuda"):
            return func(*args, **kwargs)

        name = func._schema.name
        JOURNAL.operations[name] += 1
        if func.namespace == IN_PYTHON:
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        if _is_native(func):
            return func(*args, **kwargs)
        if (begun := exchange(func, args, kwargs)) is not None:
            return begun

        if device is not None:
            # Indices may be on the host, what they are applied to may not.
            rest = (args[0], args[2:]) if name in INDEXED else (args, kwargs)
            _refuse_mixed(name, [x for x in leaves(rest) if isinstance(x, Tensor)])
        _refuse_integers(name, tensors)
        self._note_waits(name, args, kwargs, asked)

        target = asked or device
        if target is not None and target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        return self._compute(func, args, kwargs, target)

    def _compute(self, func: Any, args: Any, kwargs: Any, target: Any) -> Any:
        """Run on CPU tensors over the same memory; results go to `target`."""
        originals: dict[int, Tensor] = {}
        twins: dict[int, Tensor] = {}

        def down(x: Any) -> Any:
            if isinstance(x, Tensor) and x.is_cuda:
                if id(x) not in twins:
                    twins[id(x)] = on_cpu(x)
                    originals[id(twins[id(x)])] = x
                return twins[id(x)]
            if isinstance(x, torch.device):
                return CPU
            return self._generator(x) if isinstance(x, torch.Generator) else x

        def up(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.is_cuda:
                return x
            if id(x) in originals:
                # Written in place, or an `out=`.
                return originals[id(x)]
            return on_device(x, target) if target.type == "cuda" else x

        host_args, host_kwargs = mapped(down, (args, kwargs))
        run = TWINS.get(func, func)
        found = run(*host_args, **host_kwargs)
        name = func._schema.name
        if name.startswith("_c10d_functional::") and "wait" not in name:
            found = mapped(_waited, found)
        return mapped(up, found)

    def _generator(self, generator: torch.Generator) -> torch.Generator:
        """Return a CPU generator that stands for a CUDA one."""
        if generator.device.type == "cpu":
            return generator
        if generator not in self._generators:
            made = torch.Generator().manual_seed(generator.initial_seed())
            self._generators[generator] = made
        return self._generators[generator]

    @staticmethod
    def _note_waits(name: str, args: Any, kwargs: Any, asked: torch.device | None) -> None:
        if name.startswith(READS) or (name in INDEXED and _has_mask(args)):
            JOURNAL.wait(f"read ({name})")
        if not name.startswith(COPIES):
            return

        source = args[1] if name == "aten::copy_" else args[0]
        to = args[0].device if name == "aten::copy_" else asked or source.device
        if source.device.type == to.type:
            return
        asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        host = args[0] if name == "aten::copy_" and to.type == "cpu" else source
        pinned = host.device.type == "cpu" and host.is_pinned()
        if not (asynchronous and pinned):
            memory = "pinned" if pinned else "pageable"
            JOURNAL.wait(f"copy to {to.type} ({memory}{', asynchronous' * bool(asynchronous)})")


def _has_mask(args: Any) -> bool:
    """Whether an index is a mask, whose length is that of the result, or is in host memory."""
    return any(
        isinstance(x, Tensor) and (x.dtype == torch.bool or not x.is_cuda) for x in leaves(args[1])
    )


def _waited(x: Any) -> Any:
    return torch.ops._c10d_functional.wait_tensor(x) if isinstance(x, Tensor) else x


def _refuse_mixed(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError for host tensors in an operation of the device, as a GPU does."""
    if name.startswith(COPIES):
        return
    where = {x.device for x in tensors if x.is_cuda or x.dim()}
    if len(where) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {name} got "
            f"{', '.join(sorted(map(str, where)))} at {place()}"
        )


def _refuse_integers(name: str, tensors: Sequence[Tensor]) -> None:
    if name in WHOLE_NUMBER_PRODUCTS and not tensors[-1].is_floating_point():
        raise NotImplementedError(f"{name} has no CUDA kernel for {tensors[-1].dtype}")


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def LISTENER(what: bytes) -> None:
    """Hear of waits that the runtime is asked for, also by torch's own code."""
    JOURNAL.wait(what.decode())


MODE = EmulatedCuda()


def install() -> None:
    """Emulate in this thread and all that start from now on."""
    run = threading.Thread.run

    def emulated(thread: threading.Thread) -> None:
        with MODE:
            run(thread)

    threading.Thread.run = emulated  # type: ignore[method-assign]

    start = dist.init_process_group

    def with_gloo(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        # What a group of NCCL exchanges goes over the gloo half that it gets here.
        backend = "cpu:gloo,cuda:nccl" if backend == "nccl" else backend
        start(backend, *arguments, **options)

    dist.init_process_group = with_gloo
    load().emulated_cuda_listen(LISTENER)
    # Threads that still run when the interpreter goes must not call into it.
    atexit.register(load().emulated_cuda_listen, None)
    MODE.__enter__()
