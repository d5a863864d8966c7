"""Read boxes of global tensors out of shard files into tensors that are already there.

Where a file's block and the wanted box have the same rows' width, the bytes go from the file straight into their place; in
any other case through a buffer of one block. Mapping the files into memory was refused: a read error is then a signal
that ends the process, and no message.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2train.checkpoint.blocks import TORCH_DTYPES, bytes_of
from k2train.checkpoint.shards import DTYPES, THREADS, Place, read_header
from k2train.errors import CheckpointError


@dataclass(frozen=True)
class Target:
    """A box of a global tensor and the tensor [shape] it goes into."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class Read:
    """A block of a file that overlaps a target."""

    file: Path
    place: Place
    target: Target
    low: tuple[int, ...]
    high: tuple[int, ...]
    """The overlap, in indices of the global tensor."""


def plan_reads(
    path: Path, folder: str, manifest: dict[str, Any], targets: Sequence[Target]
) -> list[Read]:
    """What to read from where. Raises CheckpointError when the files do not hold every value of a target once, OSError and
    ValueError when a header cannot be read."""
    by_name = {target.name: target for target in targets}
    missing = {target.name: prod(target.shape) for target in targets}
    reads: list[Read] = []
    for file in sorted(name for name in manifest["files"] if name.startswith(f"{folder}/")):
        known = manifest.get("shards", {}).get(file, {}).get("tensors")
        if known is not None and not any(
            _meets(facts, by_name.get(name)) for name, facts in known.items()
        ):
            continue
        for place in read_header(path / file)[1]:
            target = by_name.get(place.name)
            if target is None or (overlap := _overlap(place.offsets, place.shape, target)) is None:
                continue
            low, high = overlap
            missing[place.name] -= prod(b - a for a, b in zip(low, high, strict=True))
            reads.append(Read(path / file, place, target, low, high))
    for name, count in missing.items():
        if count != 0:
            raise CheckpointError(
                f"{path}: {abs(count)} values of {name} are {'twice' if count < 0 else 'not'} there"
            )
    return reads


def _meets(facts: dict[str, Any], target: Target | None) -> bool:
    return target is not None and _overlap(facts["offsets"], facts["shape"], target) is not None


def _overlap(
    offsets: Sequence[int], shape: Sequence[int], target: Target
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    low = tuple(max(a, b) for a, b in zip(offsets, target.offsets, strict=True))
    ends = zip(offsets, shape, target.offsets, target.shape, strict=True)
    high = tuple(min(a + n, b + m) for a, n, b, m in ends)
    return None if any(a >= b for a, b in zip(low, high, strict=True)) else (low, high)


def fill(path: Path, reads: Iterable[Read], rounded: torch.dtype | None = None) -> None:
    """Do the reads by several threads; values are rounded to `rounded` on their way where that is given.

    Raises OSError, also for a file that ends too early.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(_do, read, rounded) for read in reads]:
            done.result()


@torch.no_grad()
def _do(read: Read, rounded: torch.dtype | None) -> None:
    place, target = read.place, read.target
    dtype = TORCH_DTYPES[place.dtype]
    row_bytes = prod(place.shape[1:]) * DTYPES[place.dtype][1]
    first = place.start + (read.low[0] - place.offsets[0]) * row_bytes
    rows = read.high[0] - read.low[0]
    into = target.values
    for dim in range(into.dim()):
        into = into.narrow(dim, read.low[dim] - target.offsets[dim], read.high[dim] - read.low[dim])
    whole_rows = (
        tuple(b - a for a, b in zip(read.low[1:], read.high[1:], strict=True)) == place.shape[1:]
    )
    if (
        whole_rows
        and into.is_contiguous()
        and into.device.type == "cpu"
        and into.dtype == dtype
        and rounded is None
    ):
        _read(read.file, bytes_of(into), first)
        return
    values = torch.empty((rows, *place.shape[1:]), dtype=dtype)
    _read(read.file, bytes_of(values), first)
    for dim in range(1, values.dim()):
        start = read.low[dim] - place.offsets[dim]
        values = values.narrow(dim, start, read.high[dim] - read.low[dim])
    into.copy_(values if rounded is None else values.to(rounded))


def _read(file: Path, into: memoryview, start: int) -> None:
    with file.open("rb", buffering=0) as stream:
        while into:
            count = os.preadv(stream.fileno(), [into], start)
            if count == 0:
                raise OSError(5, f"{file} ends at byte {start}")
            into, start = into[count:], start + count
