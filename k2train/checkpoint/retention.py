"""What may go: optimizer files of old numbered checkpoints, saves on demand that newer ones replace, unfinished ones.

Nothing goes unless two newer checkpoints remain that have their optimizer states and were read back and found whole by
this process; so at any moment at least two such are on the disk, once there were two. Weights of a numbered checkpoint
are never deleted. What goes loses its validity first, by a rename or a marker, so a kill never leaves half of it to be
taken. Counting on what an earlier process found whole was refused: disks forget between two starts.
"""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from k2train import fault_injection
from k2train.checkpoint.manifest import (
    NAME,
    is_thinned,
    list_checkpoints,
    mark_thinned,
    read_manifest,
)
from k2train.errors import CheckpointError

REMAIN = 2
"""Verified complete checkpoints that must be newer than anything that goes."""


def is_on_demand(path: Path) -> bool:
    """Whether it was saved within a chunk, on request or by time."""
    match = NAME.fullmatch(path.name)
    return bool(match and match[2])


class VerifiedCheckpoints:
    """Which checkpoints of a directory this process found whole, and when (by the monotonic clock); for all threads."""

    def __init__(self) -> None:
        self._verified_at: dict[str, float] = {}
        self._damaged: set[str] = set()
        self._lock = Lock()

    def add(self, name: str) -> None:
        """It was found whole just now."""
        with self._lock:
            self._verified_at[name] = time.monotonic()

    def mark_damaged(self, name: str) -> None:
        """It was found damaged."""
        with self._lock:
            self._verified_at.pop(name, None)
            self._damaged.add(name)

    def forget(self, name: str) -> None:
        """It is about to be written: what is known of one that had its name is of no use."""
        with self._lock:
            self._verified_at.pop(name, None)
            self._damaged.discard(name)

    def is_damaged(self, name: str) -> bool:
        with self._lock:
            return name in self._damaged

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._verified_at

    def verified_at(self, name: str) -> float:
        """When it was last found whole; before all times when never."""
        with self._lock:
            return self._verified_at.get(name, float("-inf"))


class Retention:
    """Retires checkpoints of `directory`; the newest `keep_optimizer_states` numbered ones keep theirs (0: all do)."""

    def __init__(self, directory: Path, keep_optimizer_states: int, verified: VerifiedCheckpoints):
        self.directory, self.keep, self.verified = directory, keep_optimizer_states, verified

    def retire(self) -> None:
        """Drop and thin what may go. Raises the first OSError when all was tried: one that cannot go keeps no other."""
        paths = list_checkpoints(self.directory)
        numbered = [path for path in paths if not is_on_demand(path)]
        old = numbered[: -self.keep] if self.keep > 0 else []
        actions = [
            (_expire, path)
            for path in paths
            if is_on_demand(path) and self._is_replaced(path, paths)
        ]
        actions += [
            (_thin, path) for path in old if is_thinned(path) or self._is_replaced(path, paths)
        ]
        problem: OSError | None = None
        for action, path in actions:
            try:
                action(path)
            except OSError as error:
                problem = problem or error
        if problem is not None:
            raise problem
        fault_injection.point("retire.done")

    def _is_replaced(self, path: Path, paths: list[Path]) -> bool:
        newer = paths[paths.index(path) + 1 :]
        return (
            sum(other.name in self.verified and not is_thinned(other) for other in newer) >= REMAIN
        )


def _expire(path: Path) -> None:
    expired = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(expired, ignore_errors=True)
    fault_injection.point("retire.expire")
    path.rename(expired)
    # It no longer counts; what cannot be removed now goes at the next start.
    shutil.rmtree(expired, ignore_errors=True)


def _thin(path: Path) -> None:
    if is_thinned(path):
        shutil.rmtree(path / "optimizer", ignore_errors=True)
        return
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        # It was damaged since; what is left of it may still be of use to somebody.
        return
    mark_thinned(path, manifest)
    fault_injection.point("retire.marked")
    shutil.rmtree(path / "optimizer", ignore_errors=True)


def remove_unfinished(directory: Path) -> list[str]:
    """Delete what a dead run never finished writing (the caller holds the run's lock); the names of whole directories."""
    found = sorted(directory.glob("ckpt_*.tmp"))
    for path in found:
        shutil.rmtree(path)
    # A marker or a manifest that a kill kept from its name.
    for path in directory.glob("ckpt_*/*.tmp"):
        path.unlink(missing_ok=True)
    return [path.name for path in found]


def set_aside_later(path: Path, attempt: int) -> list[str]:
    """Checkpoints after `path` would be in the way of the new ones: moved aside, never deleted; their names.

    The newest goes first: a kill in between leaves a history without a gap, and the next start does the rest.
    """
    found = list_checkpoints(path.parent)
    later = found[found.index(path) + 1 :]
    set_aside = path.parent / f"set_aside_by_attempt_{attempt}"
    for checkpoint in reversed(later):
        fault_injection.point("start.aside")
        set_aside.mkdir(exist_ok=True)
        checkpoint.rename(set_aside / checkpoint.name)
    return [checkpoint.name for checkpoint in later]


def least_recently_verified_first(
    paths: Iterable[Path], verified: VerifiedCheckpoints
) -> list[Path]:
    """By when this process last found each whole: never, then longest ago."""
    return sorted(paths, key=lambda path: verified.verified_at(path.name))
