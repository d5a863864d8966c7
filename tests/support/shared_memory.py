"""What tests of the transports in shared memory have in common."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from k2train.parallel import shared_memory
from k2train.parallel.grid import Axis
from k2train.parallel.shared_pair import BLOCK_BYTES

CPU = torch.device("cpu")
SIZES = (1, 3, BLOCK_BYTES // 8, BLOCK_BYTES // 8 + 1, 5 * BLOCK_BYTES // 8 - 7)
"""Elements: few, those of a block of fp64, one more, and several blocks with a rest."""


def refused(action: Callable[[], object]) -> str:
    """The error of an action; "done" without one."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return "done"


@contextmanager
def silent_after(seconds: int) -> Iterator[None]:
    """Connections of this process, made meanwhile, wait for a note no longer than that."""
    kept, shared_memory.SILENT_SECONDS = shared_memory.SILENT_SECONDS, seconds
    try:
        yield
    finally:
        shared_memory.SILENT_SECONDS = kept


def differences(
    results: Callable[[Axis, torch.dtype, int], list[Tensor]],
    shared: Axis,
    dtypes: Sequence[torch.dtype],
    sizes: Sequence[int] = SIZES,
) -> list[str]:
    """Which results of an axis in shared memory have not the bits of gloo's."""
    by_gloo, wrong = replace(shared, pair=None, mesh=None), []
    for dtype in dtypes:
        for size in sizes:
            pairs = zip(results(shared, dtype, size), results(by_gloo, dtype, size), strict=True)
            wrong += [
                f"{dtype} {size}: result {n}"
                for n, (ours, gloos) in enumerate(pairs)
                if not torch.equal(ours, gloos)
            ]
    return wrong


def files_left_open(connect: Callable[[], object], times: int) -> int:
    """Files that connections leave open when they are dropped."""
    before = open_files()
    for _ in range(times):
        assert connect() is not None
    return open_files() - before


def open_files() -> int:
    """Number of files that this process has open."""
    return len(os.listdir("/proc/self/fd"))


def shared_memory_bytes() -> int:
    """Bytes of the memories that this process maps and shares with other ranks."""
    total = 0
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        if line.endswith("/memfd:k2train (deleted)"):
            begin, end = (int(one, 16) for one in line.split()[0].split("-"))
            total += end - begin
    return total
