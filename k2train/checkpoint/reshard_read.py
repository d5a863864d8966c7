"""Resharding reads: boxes of global tensors from shard files into existing tensors.

- When a file's block and the wanted box have rows of the same width, bytes go straight from the
  file to their destination. Otherwise they pass through a buffer of one block.

Alternatives considered:
- Mapping the files into memory: a read error is then a signal that kills the process, not a
  message.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from k2train.checkpoint.blocks import TORCH_DTYPES, tensor_bytes
from k2train.checkpoint.manifest import BlockFacts, CheckpointManifest
from k2train.checkpoint.shards import DTYPES, THREADS, Extent, read_header
from k2train.errors import CheckpointError
from k2train.retry import retried


@dataclass(frozen=True)
class Target:
    """A box of a global tensor and the tensor [shape] that receives it."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class Read:
    """A block of a file that overlaps a target."""

    file: Path
    extent: Extent
    target: Target
    low: tuple[int, ...]
    high: tuple[int, ...]
    """Bounds of the overlap, in indices of the global tensor."""


def plan_reads(
    path: Path, folder: str, manifest: CheckpointManifest, targets: Sequence[Target]
) -> list[Read]:
    """Plan which file blocks to read for every target.

    Raises CheckpointError when the files do not hold every value of a target exactly once, and
    OSError or ValueError when a header cannot be read.
    """
    by_name = {target.name: target for target in targets}
    missing = {target.name: prod(target.shape) for target in targets}
    reads: list[Read] = []
    for file in sorted(name for name in manifest.files if name.startswith(f"{folder}/")):
        # Skip files without a wanted block; only format 2 says so without opening them.
        shard = manifest.shards.get(file)
        if shard is not None and not any(
            _overlaps(facts, by_name.get(name)) for name, facts in shard.tensors.items()
        ):
            continue

        for extent in read_header(path / file)[1]:
            target = by_name.get(extent.name)
            if (
                target is None
                or (overlap := _overlap(extent.offsets, extent.shape, target)) is None
            ):
                continue

            low, high = overlap
            # Every value of a target must be read exactly once.
            missing[extent.name] -= prod(b - a for a, b in zip(low, high, strict=True))
            reads.append(Read(path / file, extent, target, low, high))

    for name, count in missing.items():
        if count != 0:
            raise CheckpointError(
                f"{path}: {abs(count)} values of {name} are {'twice' if count < 0 else 'not'} there"
            )

    return reads


def _overlaps(facts: BlockFacts, target: Target | None) -> bool:
    return target is not None and _overlap(facts["offsets"], facts["shape"], target) is not None


def _overlap(
    offsets: Sequence[int], shape: Sequence[int], target: Target
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    low = tuple(max(a, b) for a, b in zip(offsets, target.offsets, strict=True))
    ends = zip(offsets, shape, target.offsets, target.shape, strict=True)
    high = tuple(min(a + n, b + m) for a, n, b, m in ends)
    return None if any(a >= b for a, b in zip(low, high, strict=True)) else (low, high)


def execute_reads(
    reads: Iterable[Read],
    round_to: torch.dtype | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Execute the reads in several threads, rounding values to `round_to` if given.

    `progress` is called after each, in any order.
    Raises OSError, EOFError for a truncated file, UnavailableError.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for done in [pool.submit(_execute, read, round_to) for read in reads]:
                done.result()
                progress()
        except BaseException:
            # Each read that is queued would be as patient as the first.
            pool.shutdown(cancel_futures=True)
            raise


@torch.no_grad()
def _execute(read: Read, round_to: torch.dtype | None) -> None:
    extent, target = read.extent, read.target
    dtype = TORCH_DTYPES[extent.dtype]
    row_bytes = prod(extent.shape[1:]) * DTYPES[extent.dtype][1]
    first = extent.start + (read.low[0] - extent.offsets[0]) * row_bytes
    rows = read.high[0] - read.low[0]

    destination = target.values
    for dim in range(destination.dim()):
        # The part of the destination that the block covers, as a view.
        destination = destination.narrow(
            dim, read.low[dim] - target.offsets[dim], read.high[dim] - read.low[dim]
        )

    # Contiguous rows of equal width can be read straight into the destination.
    whole_rows = (
        tuple(b - a for a, b in zip(read.low[1:], read.high[1:], strict=True)) == extent.shape[1:]
    )
    if (
        whole_rows
        and destination.is_contiguous()
        and destination.device.type == "cpu"
        and destination.dtype == dtype
        and round_to is None
    ):
        _read(read.file, tensor_bytes(destination), first)
        return

    # Rows differ in width, dtype or device: read whole rows, then copy the wanted part.
    values = torch.empty((rows, *extent.shape[1:]), dtype=dtype)
    _read(read.file, tensor_bytes(values), first)
    for dim in range(1, values.dim()):
        start = read.low[dim] - extent.offsets[dim]
        values = values.narrow(dim, start, read.high[dim] - read.low[dim])

    destination.copy_(values if round_to is None else values.to(round_to))


def _read(file: Path, destination: memoryview, start: int) -> None:
    retried(lambda: _read_once(file, destination, start), file)


def _read_once(file: Path, destination: memoryview, start: int) -> None:
    with file.open("rb", buffering=0) as stream:
        while destination:
            count = os.preadv(stream.fileno(), [destination], start)
            # The file is shorter than its header says.
            if count == 0:
                raise EOFError(f"{file} ends at byte {start}")
            destination, start = destination[count:], start + count
