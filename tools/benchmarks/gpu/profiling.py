"""Profile of a training step by category: torch's profiler on the CPU and on CUDA alike.

- An operation belongs to its scope (attention, loss, optimizer, gradients, communication), else to
  its type (product, copy, elementwise).
- Scopes are put around the engine's parts from outside. A backward operation is in the scope of the
  forward operation that it differentiates.
- Time without an operation is Python and the rest of the host.
- A scope around a layer's attention makes the layer run part by part, which costs small layers time
  of the host. So the table has a step without the profiler beside it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from k2train.data.loader import MicroBatch
from k2train.model.kernels.openblas import PROFILED_AS
from k2train.parallel.shared_channel import Receipt, SharedChannel
from k2train.parallel.shared_pair import SharedPair

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_mm",
    "aten::mkldnn_linear",
    "mkldnn::_linear",
    "aten::linear",
    PROFILED_AS,
)
COPIES = (
    "aten::copy_",
    "aten::cat",
    "aten::clone",
    "aten::contiguous",
    "aten::_to_copy",
    "Memcpy",
    "aten::_foreach_copy_",
)
FILLS = (
    "aten::zero_",
    "aten::fill_",
    "aten::empty",
    "aten::resize_",
    "Memset",
    "aten::_foreach_zero_",
)
COMMUNICATION = ("c10d::", "gloo:", "nccl:", "record_param_comms", "_c10d_functional")
OPTIMIZER = ("aten::_fused_adamw_", "aten::_foreach_norm", "aten::linalg_vector_norm")
WARM_UP_STEPS = 3
TOP = 20
"""Kernels that a profile names."""
CATEGORIES = (
    "products", "attention", "loss", "elementwise", "copies", "fills",
    "communication", "optimizer", "gradients",
)  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """One step: seconds by category, and the host's requests to the device."""

    plain_seconds: float
    """A step with no profiler."""
    profiled_seconds: float
    seconds: Mapping[str, float]
    """Category -> seconds, on the device where there is one, else on the CPU; of the profiled
    step.
    """
    operations: int
    busy_seconds: float | None
    """Device time in which at least one kernel or copy ran; None on the CPU."""
    kernels: int
    synchronisations: int
    to_host: int
    """Copies from the device to the host."""
    top: tuple[tuple[str, float, float], ...] = ()
    """(name, seconds a step, calls a step) of the kernels, on the CPU operations, that took most of
    the time, longest first.
    """

    @property
    def rest_seconds(self) -> float:
        """Seconds of the profiled step outside all categories."""
        return max(0.0, self.profiled_seconds - sum(self.seconds.values()))


def scoped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` in a named scope."""

    def inside(*arguments: Any, **keywords: Any) -> Any:
        with record_function(f"scope::{name}"):
            return function(*arguments, **keywords)

    return inside


@contextmanager
def scopes(parts: Sequence[tuple[str, Any, str]]) -> Iterator[None]:
    """Wrap the callable attribute of each (scope, object, attribute) in its scope until the end."""
    before = []
    for scope, owner, attribute in parts:
        function = getattr(owner, attribute, None)
        if callable(function):
            before.append((owner, attribute, attribute in vars(owner), function))
            _put(owner, attribute, scoped(scope, function))

    try:
        yield
    finally:
        for owner, attribute, own, function in reversed(before):
            if own:
                _put(owner, attribute, function)
            else:
                object.__delattr__(owner, attribute)


def _put(owner: Any, attribute: str, value: Any) -> None:
    """Set an attribute past nn.Module, which handles a module's own attributes specially."""
    if isinstance(owner, type):
        setattr(owner, attribute, value)
    else:
        object.__setattr__(owner, attribute, value)


def engine_parts(engine: Any) -> list[tuple[str, Any, str]]:
    """The parts of a k2train engine that a table names."""
    # A wait for a collective happens in Python, where no operation is seen.
    parts = [("communication", dist.Work, "wait"), ("communication", SharedPair, "exchange")]
    parts += [("communication", SharedChannel, "send"), ("communication", Receipt, "wait")]
    parts.append(("optimizer", engine.optimizer, "step"))
    parts += [("gradients", engine.gradients, name) for name in ("zero", "reduce")]
    for stage in engine.stages.values():
        parts.append(("loss", stage, "loss"))
        parts += [
            ("attention", module, "kernel")
            for module in stage.modules()
            if hasattr(module, "kernel")
        ]
    return parts


def scope_of(name: str) -> str | None:
    """The scope that an event opens by its name."""
    if name.startswith("scope::"):
        return name.removeprefix("scope::")
    lower = name.lower()
    if any(word in lower for word in ("attention", "flash", "fmha")):
        return "attention"
    if any(
        word in lower
        for word in ("cross_entropy", "crossentropy", "headloss", "fusedloss", "nll_loss")
    ):
        return "loss"

    if name.startswith(COMMUNICATION):
        return "communication"
    return "optimizer" if name.startswith(OPTIMIZER) else None


def leaf_category(name: str) -> str:
    """Category of an operation outside all scopes, by its name."""
    for category, names in (("products", PRODUCTS), ("copies", COPIES), ("fills", FILLS)):
        if name.startswith(names):
            return category
    return "elementwise"


class Sorter:
    """Assigns the events of one profile to categories."""

    def __init__(self, events: Sequence[Any]):
        # By identity: the events' own numbers are given out twice.
        self._scopes: dict[int, str | None] = {}
        self._forward: dict[int, str] = {}
        for event in events:
            scope = self.scope(event)
            if scope is not None and event.sequence_nr >= 0 and not self._backward(event):
                self._forward.setdefault(event.sequence_nr, scope)
        self._scopes.clear()

    def _backward(self, event: Any) -> bool:
        return event.name.startswith("autograd::engine::evaluate_function")

    def scope(self, event: Any) -> str | None:
        """Outermost scope of an event."""
        if id(event) in self._scopes:
            return self._scopes[id(event)]
        parent = event.cpu_parent
        found = self.scope(parent) if parent is not None else None
        if found is None:
            found = scope_of(event.name)
        if found is None and self._backward(event):
            found = self._forward.get(event.sequence_nr)
        self._scopes[id(event)] = found
        return found

    def category(self, event: Any) -> str:
        """Category of an event."""
        return self.scope(event) or leaf_category(event.name)


STEP = "step::whole"


def profile_engine(
    engine: Any, batch: Sequence[MicroBatch], lr: float, cuda: bool, steps: int = 2
) -> Profile:
    """Profile of a k2train engine's step, after warm-up."""

    def step() -> None:
        engine.train_step(batch, lr)

    with scopes(engine_parts(engine)):
        for _ in range(WARM_UP_STEPS):
            step()
        return profile_step(step, cuda, steps)


def profile_step(step: Callable[[], Any], cuda: bool, steps: int = 2) -> Profile:
    """Profile `step`, which has run before; the mean over `steps` of them."""
    plain = _wall(step, cuda, max(steps, 3)) / max(steps, 3)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        wall = _wall(step, cuda, steps)
    events = list(recorded.events())
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]

    # Scopes are drawn on the device's line too, across the gaps between their kernels.
    device = [
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("scope::", STEP))
    ]

    asked = [event.name for event in host if event.name.startswith("cu")]
    intervals = [(event.time_range.start, event.time_range.end) for event in device]

    return Profile(
        plain,
        wall / steps,
        {name: spent / steps for name, spent in by_category(host, cuda).items()},
        sum(event.name.startswith("aten::") for event in host) // steps,
        _union(intervals) / 1e6 / steps if cuda else None,
        sum("LaunchKernel" in name or "GraphLaunch" in name for name in asked) // steps,
        sum("Synchronize" in name for name in asked) // steps,
        sum(event.name.startswith("Memcpy DtoH") for event in device) // steps,
        longest(device if cuda else host, cuda, steps),
    )


def longest(events: Sequence[Any], cuda: bool, steps: int) -> tuple[tuple[str, float, float], ...]:
    """(name, seconds a step, calls a step) of the `TOP` names with the longest time, in order.

    On a device the time of the kernels, on the CPU an operation's own.
    """
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in events:
        if (not cuda and "::" not in event.name) or event.name.startswith(("scope::", STEP)):
            continue
        spent = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        seconds[event.name] = seconds.get(event.name, 0.0) + spent / 1e6
        calls[event.name] = calls.get(event.name, 0) + 1
    names = sorted(seconds, key=seconds.__getitem__, reverse=True)[:TOP]
    return tuple((name, seconds[name] / steps, calls[name] / steps) for name in names)


def by_category(host: Sequence[Any], cuda: bool) -> dict[str, float]:
    """Seconds of all profiled steps by category: of kernels on a device, else of operations.

    On the CPU only the stepping thread counts: it waits for what others do.
    """
    sorter = Sorter(host)
    threads = {event.thread for event in host if event.name == STEP}
    seconds = dict.fromkeys(CATEGORIES, 0.0)

    for event in host:
        # The own time of a scope, of a function of ours or of autograd's machinery is Python; that
        # of waiting is not.
        python = event.name.startswith((STEP, "scope::", "autograd::")) or (
            not cuda and "::" not in event.name
        )
        if (python and event.name != "scope::communication") or (
            not cuda and event.thread not in threads
        ):
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        seconds[sorter.category(event)] += spent / 1e6

    return seconds


def _wall(step: Callable[[], Any], cuda: bool, steps: int) -> float:
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        with record_function(STEP):
            step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _union(intervals: Sequence[tuple[float, float]]) -> float:
    """Total length covered by at least one interval."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
