"""Checkpoint verification: manifest, every file, header and tensor, no stray shard. No torch.

- Only the bytes that a manifest names are read, each once. Files and tensors are hashed in several
  threads.
- Damage is reported by file and tensor.
- An audit checks the SHA-256 of each file besides the hashes of its pieces. A save's read-back
  looks for accidents and leaves it out.
"""

import errno
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import NamedTuple

from k2train.checkpoint.manifest import (
    FOLDERS,
    MANIFEST,
    CheckpointManifest,
    FileFacts,
    PieceFacts,
    ShardFacts,
    check_marker,
    is_thinned,
    list_checkpoints,
    read_manifest,
)
from k2train.checkpoint.piece_check import (
    PROGRESS_BYTES,
    Damage,
    check_blocks,
    pieces_of,
)
from k2train.checkpoint.shards import DTYPES, THREADS, Extent, read_header
from k2train.checkpoint.side_files import FileTable, read_pieces
from k2train.errors import CheckpointError, UnavailableError
from k2train.retry import is_bad_block, is_folder_retried, list_retried, retried

READ_BYTES = 1 << 20
"""Bytes hashed at once: still in the core's cache after the read."""
READAHEAD_BYTES = 1 << 23
"""Bytes requested from the disk beyond those, so that it works while they are hashed."""


def folders_of(path: Path) -> tuple[str, ...]:
    """Folders whose files must exist: a thinned checkpoint needs no optimizer files."""
    return FOLDERS[:1] if is_thinned(path) else FOLDERS


def check_folders(path: Path, manifest: CheckpointManifest, table: FileTable) -> None:
    """Check that no folder holds a shard beside those of `table`, and the thinning marker.

    A reader would load the tensors of a stray shard, too. Raises CheckpointError, UnavailableError.
    """
    for folder in FOLDERS:
        inside = path / folder
        there = [file.name for file in list_retried(inside)] if is_folder_retried(inside) else []
        known = table.names(folder) if there else set()
        for name in sorted(there):
            # A stray shard would be read by any reader that lists the folder.
            if f"{folder}/{name}" not in known:
                raise CheckpointError(f"{path}: {folder}/{name} is not in the manifest; remove it")

    if is_thinned(path):
        check_marker(path, manifest)


def no_progress() -> None:
    """Do nothing: nobody waits for a sign of progress."""


def verify_files(
    path: Path,
    manifest: CheckpointManifest,
    files: Mapping[str, FileFacts],
    threads: int = THREADS,
    progress: Callable[[], None] = no_progress,
    audit: bool = False,
    fresh: bool = False,
) -> None:
    """Check size, header and every tensor of `files` in several threads.

    - `audit` also checks the SHA-256 of whole files.
    - `fresh` reads side files even if they are known.
    - `progress` is called about once a `PROGRESS_BYTES` of what was hashed, in any thread.

    Raises CheckpointError naming the first file and tensor that differ.
    """
    tasks: list[_Task] = []
    for name, facts, shard, extents in check_headers(path, manifest, files, fresh, progress):
        tasks += _tasks(path / name, name, facts, shard, extents, audit)

    problem = _first_problem(tasks, threads, progress)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")


def check_headers(
    path: Path,
    manifest: CheckpointManifest,
    files: Mapping[str, FileFacts],
    fresh: bool = False,
    progress: Callable[[], None] = no_progress,
) -> "list[tuple[str, FileFacts, PieceFacts | ShardFacts | None, list[Extent]]]":
    """Check size and header of every file; return (name, facts, what it holds, extents of blocks).

    `fresh` reads side files even if they are known; `progress` is called after each file. A file of
    format 1 has neither facts of its blocks nor extents. Raises CheckpointError, UnavailableError.
    """
    root, found = path.resolve(), []
    for name, facts in files.items():
        # A link inside the checkpoint could point out of it.
        if not (path / name).resolve().is_relative_to(root):
            raise CheckpointError(f"{path}: the manifest names {name}, outside the checkpoint")

        problem, extents = _size_problem(path / name, facts), list[Extent]()
        if problem is None:
            shard = read_pieces(path, manifest, name, facts, fresh)
            if shard is not None:
                problem, extents = _layout_problem(path / name, shard, facts.bytes)
        if problem is not None:
            raise CheckpointError(f"{path}: {name} {problem}")
        found.append((name, facts, shard, extents))
        progress()
    return found


def has_bad_block(error: UnavailableError, path: Path) -> bool:
    """Return whether a file of checkpoint `path` itself cannot be read, while its file system
    answers: another manifest of the run can be read, or its own.

    Raises nothing: a rank that asks has an error to tell the others.
    """
    if error.number != errno.EIO:
        return False
    try:
        beside = list_checkpoints(path.parent)
    except (OSError, UnavailableError):
        return False
    return any(is_bad_block(error, other / MANIFEST) for other in beside)


def verify_checkpoint(path: Path, threads: int = THREADS) -> CheckpointManifest:
    """Verify a whole checkpoint: manifest, every file, no stray shard. Returns the manifest.

    Raises CheckpointError.
    """
    manifest = read_manifest(path, fresh=True)
    table = FileTable(path, manifest, fresh=True)
    files = table.shares(folders_of(path), 0, 1)
    check_folders(path, manifest, table)
    verify_files(path, manifest, files, threads, audit=True, fresh=True)
    return manifest


def _size_problem(path: Path, facts: FileFacts) -> str | None:
    """Describe what is wrong with the file's existence or size; None when nothing is."""
    try:
        status = retried(path.stat, path)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"

    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"

    size = status.st_size
    return None if size == facts.bytes else f"has {size} bytes, the manifest says {facts.bytes}"


def _layout_problem(
    path: Path, shard: PieceFacts | ShardFacts, size: int
) -> tuple[str | None, list[Extent]]:
    """Describe what is wrong with a file's header, and return the extents of its tensors.

    Every byte of the file belongs to the header or to a tensor.
    """
    try:
        header, extents = read_header(path)
    except (OSError, ValueError) as error:
        return f"has a damaged header ({error})", []

    if sha256(header).hexdigest() != shard.header_sha256:
        return "does not match the header in the manifest; it was changed or damaged", []

    offset = len(header)
    for extent in extents:
        known = shard.tensors.get(extent.name)
        if (
            known is None
            or known["offsets"] != list(extent.offsets)
            or known["shape"] != list(extent.shape)
        ):
            return f"has a tensor {extent.name} that the manifest does not describe so", []

        if (
            extent.start != offset
            or extent.stop - extent.start != prod(extent.shape) * DTYPES[extent.dtype][1]
        ):
            return (
                f"has tensor {extent.name} at bytes {extent.start} to {extent.stop}, it should "
                f"begin at {offset}",
                [],
            )

        offset = extent.stop
        if isinstance(shard, PieceFacts):
            try:
                pieces_of(shard, extent, 0, 0)
            except Damage as error:
                return f"is not what its side file says{error}", []

    if offset != size:
        return f"has {size - offset} bytes after its last tensor", []
    if missing := sorted(set(shard.tensors) - {extent.name for extent in extents}):
        return f"has no tensor {missing[0]}", []
    return None, extents


def hash_range(
    path: Path, start: int, stop: int, progress: Callable[[], None] = no_progress
) -> str:
    """sha256 of bytes `start` to `stop`. Raises OSError; EOFError when the file ends earlier."""
    found, buffer = sha256(), bytearray(min(READ_BYTES, max(stop - start, 1)))
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while start < stop:
            os.posix_fadvise(
                stream.fileno(), start, min(READAHEAD_BYTES, stop - start), os.POSIX_FADV_WILLNEED
            )
            count = os.preadv(stream.fileno(), [view[: stop - start]], start)
            if count == 0:
                raise EOFError(f"the file ends at byte {start}")
            found.update(view[:count])
            start += count
            if start // PROGRESS_BYTES != (start - count) // PROGRESS_BYTES:
                progress()

    progress()
    return found.hexdigest()


class _Task(NamedTuple):
    """Bytes to read at a stretch: blocks of format 3, or a range with one SHA-256."""

    file: Path
    name: str
    extents: list[Extent]
    pieces: PieceFacts | None
    sha256: str | None
    """Of the whole file, or of the only block."""
    size: int
    """Of the file."""


def _tasks(
    file: Path,
    name: str,
    facts: FileFacts,
    shard: PieceFacts | ShardFacts | None,
    extents: list[Extent],
    audit: bool,
) -> list[_Task]:
    if isinstance(shard, PieceFacts):
        # One thread reads a file in order: the disk is the slower part.
        return [_Task(file, name, extents, shard, facts.sha256 if audit else None, facts.bytes)]
    if shard is not None:
        return [
            _Task(file, name, [e], None, shard.tensors[e.name]["sha256"], facts.bytes)
            for e in extents
        ]
    # Format 1 has one hash per file.
    return [_Task(file, name, [], None, facts.sha256, facts.bytes)]


def _check(task: _Task, progress: Callable[[], None]) -> str | None:
    """Read what the task names; describe what is wrong, else None."""
    only = task.extents[0] if len(task.extents) == 1 else None
    what = f"{task.name}: tensor {only.name}" if only is not None else task.name
    try:
        if task.pieces is not None:
            check_blocks(task.file, task.extents, task.pieces, task.sha256, progress)
            return None
        start, stop = (0, task.size) if only is None else (only.start, only.stop)
        found = retried(lambda: hash_range(task.file, start, stop, progress), task.file)
    except Damage as error:
        return f"{task.name}{error}"
    except (OSError, EOFError) as error:
        return f"{what} cannot be read ({getattr(error, 'strerror', None) or error})"

    return (
        None
        if found == task.sha256
        else f"{what} does not match its hash in the manifest; it was changed or damaged"
    )


def _first_problem(
    tasks: Sequence[_Task], threads: int, progress: Callable[[], None]
) -> str | None:
    if threads == 1:
        return next((p for p in (_check(task, progress) for task in tasks) if p), None)

    with ThreadPoolExecutor(threads) as pool:
        try:
            found = pool.map(lambda task: _check(task, progress), tasks)
            return next((problem for problem in found if problem), None)
        finally:
            # After the first problem the others are of no use.
            pool.shutdown(wait=True, cancel_futures=True)
