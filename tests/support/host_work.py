"""Work of the host in a piece of code: operators started, and calls made by k2train's own code.

Both are counts, not times: they are the same on every machine.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

import k2train

PACKAGE = str(Path(k2train.__file__).parent)


class HostWork(NamedTuple):
    """Counts of one run."""

    operators: int
    """Operators of torch, views included."""
    calls: int
    """Functions of k2train that were called, and functions in C that they called."""


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return operator(*args, **(kwargs or {}))


def host_work(run: Callable[[], object]) -> HostWork:
    """Run twice, on one thread, and count."""
    with _Operators() as operators:
        run()
    return HostWork(operators.count, _calls(run))


def _calls(run: Callable[[], object]) -> int:
    count = 0

    def see(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE):
            count += 1

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count
