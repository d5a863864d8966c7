"""Resharding reads: boxes of global tensors from shard files into existing tensors.

- When a file's block and the wanted box have rows of the same width, bytes go straight from the
  file to their destination. Otherwise they pass through a buffer of one block.
- From format 3 on each piece is checked where it lies after the read. One that only partly belongs
  to the destination passes through a buffer.
- Files that a rank of the same layout wrote are looked at first. Only if they do not hold all of
  its values are the side files of the others read.

Alternatives considered:
- Mapping the files into memory: a read error is then a signal that kills the process, not a
  message.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from k2train.checkpoint.blocks import TORCH_DTYPES, tensor_bytes
from k2train.checkpoint.manifest import BlockFacts, CheckpointManifest, FileFacts, PieceFacts
from k2train.checkpoint.piece_check import Damage, ShardReader, pieces_of
from k2train.checkpoint.shards import DTYPES, THREADS, Extent, read_header
from k2train.checkpoint.side_files import FileTable, read_pieces
from k2train.errors import CheckpointError


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

    reader: ShardReader
    extent: Extent
    target: Target
    low: tuple[int, ...]
    high: tuple[int, ...]
    """Bounds of the overlap, in indices of the global tensor."""
    pieces: PieceFacts | None = None
    """Hashes of the file's pieces, from format 3 on."""
    part: tuple[int, int] | None = None
    """Only these bytes of the file, of a block that goes straight to its destination."""

    @property
    def whole(self) -> bool:
        """Whether the block is the target: a hash of its bytes then proves their place, too."""
        return (self.extent.offsets, self.extent.shape) == (self.target.offsets, self.target.shape)


def plan_reads(
    path: Path,
    folder: str,
    manifest: CheckpointManifest,
    targets: Sequence[Target],
    first: Sequence[int] = (),
    progress: Callable[[], None] = lambda: None,
) -> list[Read]:
    """Plan which file blocks to read for every target.

    Files of the indices `first` are looked at first, and the others only if a value is missing. A
    value that is in one of those, too, is then not found here; their sizes tell. `progress` is
    called after each file.
    Raises CheckpointError when the files do not hold every value of a target exactly once, and
    OSError or ValueError when a header cannot be read.
    """
    plan, table = _Plan(path, manifest, targets), FileTable(path, manifest)
    count = max(table.count(folder), 1)
    near = {name: facts for at in first for name, facts in table.share(folder, at, count).items()}
    for name, facts in near.items():
        plan.add(name, facts)
        progress()

    if not plan.is_complete:
        for name, facts in table.all(folder).items():
            if name not in near:
                plan.add(name, facts)
                progress()

    for key, count in plan.missing.items():
        if count != 0:
            raise CheckpointError(
                f"{path}: {abs(count)} values of {key} are {'twice' if count < 0 else 'not'} there"
            )

    return plan.reads


class _Plan:
    """Reads found so far, and the number of values of each target that are still missing."""

    def __init__(self, path: Path, manifest: CheckpointManifest, targets: Sequence[Target]) -> None:
        self.path, self.manifest = path, manifest
        self.by_name = {target.name: target for target in targets}
        self.missing = {target.name: prod(target.shape) for target in targets}
        self.reads: list[Read] = []

    @property
    def is_complete(self) -> bool:
        """Whether every value was found, and none twice."""
        return not any(self.missing.values())

    def add(self, name: str, facts: FileFacts) -> None:
        """Add the reads of one file; one without a wanted block is not opened."""
        shard = read_pieces(self.path, self.manifest, name, facts)
        # Format 1 does not say what a file holds.
        if shard is not None and not any(
            _overlaps(block, self.by_name.get(key)) for key, block in shard.tensors.items()
        ):
            return

        header, extents = read_header(self.path / name)
        if shard is not None and sha256(header).hexdigest() != shard.header_sha256:
            raise CheckpointError(
                f"{self.path}: {name} does not match the header in the manifest; it was changed or "
                "damaged"
            )
        pieces = shard if isinstance(shard, PieceFacts) else None
        reader = ShardReader(self.path / name)

        for extent in extents:
            target = self.by_name.get(extent.name)
            if (
                target is None
                or (overlap := _overlap(extent.offsets, extent.shape, target)) is None
            ):
                continue

            low, high = overlap
            # Every value of a target must be read exactly once.
            self.missing[extent.name] -= prod(b - a for a, b in zip(low, high, strict=True))
            self.reads.append(Read(reader, extent, target, low, high, pieces))


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

    - Pieces are read in the order of the file: a disk is fastest so, and several threads then share
      a large block.
    - `progress` is called after each, in any order.

    Raises OSError, EOFError for a truncated file, UnavailableError, and Damage when a piece is not
    what was saved.
    """
    parts = [part for read in reads for part in _parts(read, round_to)]
    before: ShardReader | None = None
    failed = Event()

    def execute(part: Read) -> None:
        # Each read that waits would be as patient as the first.
        if failed.is_set():
            return
        try:
            _execute(part, round_to)
        except BaseException:
            failed.set()
            raise

    with ExitStack() as opened, ThreadPoolExecutor(THREADS) as pool:
        for reader in {part.reader for part in parts}:
            opened.callback(reader.close)
        try:
            for part, done in [(part, pool.submit(execute, part)) for part in parts]:
                done.result()
                progress()
                # All of the file before is read.
                if before is not None and before is not part.reader:
                    before.close()
                before = part.reader
        except BaseException:
            # Also one of this thread, such as a signal.
            failed.set()
            raise


def _parts(read: Read, round_to: torch.dtype | None) -> list[Read]:
    """Cut a read at the bounds of pieces, if its bytes need no other treatment."""
    if read.pieces is None or _destination(read, round_to) is None:
        return [read]
    first, stop = _span(read)
    return [
        replace(read, part=(max(low, first), min(high, stop)))
        for low, high, _ in _pieces(read, first, stop)
    ]


def _pieces(read: Read, low: int, high: int) -> Sequence[tuple[int, int, str]]:
    """`pieces_of` the block; an error names the file."""
    assert read.pieces is not None, "format 3 has pieces"
    try:
        return pieces_of(read.pieces, read.extent, low, high)
    except Damage as error:
        raise Damage(f"{read.reader.file.parent.name}/{read.reader.file.name}{error}") from None


def _span(read: Read) -> tuple[int, int]:
    """Bytes of the file that hold the wanted rows of a block."""
    extent = read.extent
    row_bytes = prod(extent.shape[1:]) * DTYPES[extent.dtype][1]
    first = extent.start + (read.low[0] - extent.offsets[0]) * row_bytes
    return first, first + (read.high[0] - read.low[0]) * row_bytes


def _view(read: Read) -> Tensor:
    """Part of the target that the block covers."""
    view = read.target.values
    for dim in range(view.dim()):
        view = view.narrow(
            dim, read.low[dim] - read.target.offsets[dim], read.high[dim] - read.low[dim]
        )
    return view


def _destination(read: Read, round_to: torch.dtype | None) -> memoryview | None:
    """Bytes of the target that the wanted rows can be read into; None if they must be copied."""
    view, extent = _view(read), read.extent
    # Contiguous rows of equal width can be read straight into the destination.
    whole_rows = (
        tuple(b - a for a, b in zip(read.low[1:], read.high[1:], strict=True)) == extent.shape[1:]
    )
    if (
        whole_rows
        and view.is_contiguous()
        and view.device.type == "cpu"
        and view.dtype == TORCH_DTYPES[extent.dtype]
        and round_to is None
    ):
        return tensor_bytes(view)
    return None


@torch.no_grad()
def _execute(read: Read, round_to: torch.dtype | None) -> None:
    first, stop = _span(read)
    destination = _destination(read, round_to)
    if destination is not None:
        low, high = read.part or (first, stop)
        _fill(read, destination[low - first : high - first], low)
        return

    # Rows differ in width, dtype or device: read whole rows, then copy the wanted part.
    extent = read.extent
    rows = read.high[0] - read.low[0]
    values = torch.empty((rows, *extent.shape[1:]), dtype=TORCH_DTYPES[extent.dtype])
    _fill(read, tensor_bytes(values), first)
    for dim in range(1, values.dim()):
        start = read.low[dim] - extent.offsets[dim]
        values = values.narrow(dim, start, read.high[dim] - read.low[dim])

    _view(read).copy_(values if round_to is None else values.to(round_to))


def _fill(read: Read, view: memoryview, first: int) -> None:
    """Fill `view` with the file's bytes from `first` on, and check all pieces they belong to."""
    reader = read.reader
    if read.pieces is None:
        reader.read(view, first)
        return

    parts = _pieces(read, first, first + view.nbytes)
    try:
        for start, stop, wanted in parts:
            low, high = max(start, first), min(stop, first + view.nbytes)
            destination = view[low - first : high - first]
            if (low, high) == (start, stop):
                reader.read_piece(destination, start, wanted, read.extent.name)
            else:
                # Only part of the piece is wanted, but its hash is that of all of it.
                buffer = memoryview(bytearray(stop - start))
                reader.read_piece(buffer, start, wanted, read.extent.name)
                destination[:] = buffer[low - start : high - start]
    except Damage as error:
        raise Damage(f"{reader.file.parent.name}/{reader.file.name}{error}") from None
