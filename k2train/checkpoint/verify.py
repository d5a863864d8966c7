"""Checkpoint verification: manifest, every file, header and tensor, no stray shard. No torch.

- Only the bytes that a manifest names are read, each once. Tensors are hashed in several threads.
- Damage is reported by file and tensor.
"""

import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from math import prod
from pathlib import Path

from k2train.checkpoint.manifest import (
    FOLDERS,
    MANIFEST,
    CheckpointManifest,
    FileFacts,
    ShardFacts,
    check_marker,
    is_thinned,
    list_checkpoints,
    read_manifest,
)
from k2train.checkpoint.shards import DTYPES, THREADS, Extent, read_header
from k2train.errors import CheckpointError, UnavailableError
from k2train.retry import is_bad_block, retried

READ_BYTES = 1 << 20
"""Bytes hashed at once: still in the core's cache after the read."""
READAHEAD_BYTES = 1 << 23
"""Bytes requested from the disk beyond those, so that it works while they are hashed."""
PROGRESS_BYTES = 1 << 26
"""A slow disk reads as much within any timeout."""


def expected_files(path: Path, manifest: CheckpointManifest) -> list[str]:
    """Names of the files that must exist, sorted. A thinned checkpoint needs no optimizer files.

    Raises CheckpointError for a shard that exists but is not in the manifest, since a reader would
    load its tensors too, and for a damaged marker.
    """
    for folder in FOLDERS:
        for file in sorted((path / folder).glob("*")):
            # A stray shard would be read by any reader that lists the folder.
            if f"{folder}/{file.name}" not in manifest.files:
                raise CheckpointError(
                    f"{path}: {folder}/{file.name} is not in the manifest; remove it"
                )

    skip = is_thinned(path)
    if skip:
        check_marker(path, manifest)
    return sorted(name for name in manifest.files if not (skip and name.startswith("optimizer/")))


def no_progress() -> None:
    """Do nothing: nobody waits for a sign of progress."""


def verify_files(
    path: Path,
    manifest: CheckpointManifest,
    names: Iterable[str],
    threads: int = THREADS,
    progress: Callable[[], None] = no_progress,
) -> None:
    """Check size, header and every tensor of `names` in several threads.

    `progress` is called about once a `PROGRESS_BYTES` of what was hashed, in any thread.
    Raises CheckpointError naming the first file and tensor that differ.
    """
    names = list(names)
    root = path.resolve()
    for name in names:
        # A link inside the checkpoint could point out of it.
        if not (path / name).resolve().is_relative_to(root):
            raise CheckpointError(f"{path}: the manifest names {name}, outside the checkpoint")
    problem = _first_problem(path, manifest, names, threads, progress)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")


def has_bad_block(error: UnavailableError, path: Path) -> bool:
    """Return whether a file of checkpoint `path` itself cannot be read, while its file system
    answers: another manifest of the run can be read, or its own.
    """
    return any(is_bad_block(error, other / MANIFEST) for other in list_checkpoints(path.parent))


def verify_checkpoint(path: Path, threads: int = THREADS) -> CheckpointManifest:
    """Verify a whole checkpoint: manifest, every file, no stray shard. Returns the manifest.

    Raises CheckpointError.
    """
    manifest = read_manifest(path)
    verify_files(path, manifest, expected_files(path, manifest), threads)
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


def _layout_problem(path: Path, shard: ShardFacts, size: int) -> tuple[str | None, list[Extent]]:
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


def _first_problem(
    path: Path,
    manifest: CheckpointManifest,
    names: Iterable[str],
    threads: int,
    progress: Callable[[], None],
) -> str | None:
    """Describe the first bad file of `names` by file and tensor, else None.

    A file without an entry in the manifest's shards is hashed as a whole.
    """
    tasks: list[tuple[str, str | None, int, int, str]] = []
    for name in names:
        facts, shard = manifest.files[name], manifest.shards.get(name)
        problem = _size_problem(path / name, facts)
        if problem is None and shard is not None:
            # The header is checked at once, the tensors' bytes in threads below.
            problem, extents = _layout_problem(path / name, shard, facts.bytes)
            tasks += [
                (name, p.name, p.start, p.stop, shard.tensors[p.name]["sha256"]) for p in extents
            ]

        if problem is not None:
            return f"{name} {problem}"

        if shard is None:
            # Format 1 has one hash per file.
            tasks.append((name, None, 0, facts.bytes, facts.sha256))

    def check(task: tuple[str, str | None, int, int, str]) -> str | None:
        name, tensor, start, stop, expected = task
        what = "" if tensor is None else f": tensor {tensor}"
        try:
            found = retried(lambda: hash_range(path / name, start, stop, progress), path / name)
        except OSError as error:
            return f"{name}{what} cannot be read ({error.strerror or error})"
        except EOFError as error:
            return f"{name}{what} cannot be read ({error})"

        return (
            None
            if found == expected
            else f"{name}{what} does not match its hash in the manifest; it was changed or damaged"
        )

    if threads == 1:
        return next((problem for problem in map(check, tasks) if problem), None)

    with ThreadPoolExecutor(threads) as pool:
        return next((problem for problem in pool.map(check, tasks) if problem), None)
