"""Checkpoint retention: thin old numbered checkpoints, drop replaced on-demand ones, clean up.

- Nothing is removed unless two newer checkpoints remain that are complete and were verified by this
  process. Once there were two of them, the disk always holds at least two.
- Weights of a numbered checkpoint are never deleted.
- A checkpoint with a file KEEP stays as it is. Saves that a person asked for get one; removing the
  file gives the checkpoint back to the policy, and `touch` keeps any other.
- A rename or a marker invalidates a checkpoint before its files are deleted. A kill in between
  never leaves half of one to be loaded.

Alternatives considered:
- Trusting the verification of an earlier process: disks lose data between two starts.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock

from k2train import fault_injection
from k2train.checkpoint.manifest import (
    FACTS,
    NAME,
    is_thinned,
    list_checkpoints,
    mark_thinned,
    read_manifest,
)
from k2train.checkpoint.save_events import SaveEvents
from k2train.errors import CheckpointError, UnavailableError
from k2train.retry import exists_retried, is_folder_retried, list_retried

REMAIN = 2
"""Number of verified complete checkpoints that must be newer than anything removed."""

ON_DEMAND_AT_ONCE = REMAIN + 1
"""Checkpoints inside chunks that exist at once: those that remain, and the one being written."""


KEEP = "KEEP"
"""File in a checkpoint that stays as it is."""


def is_kept(path: Path) -> bool:
    """Whether somebody asked for a checkpoint, and it stays until they say otherwise."""
    return exists_retried(path / KEEP)


def is_on_demand(path: Path) -> bool:
    """Whether a checkpoint was saved within a chunk, on request or by time."""
    match = NAME.fullmatch(path.name)
    return bool(match and match[2])


class VerifiedCheckpoints:
    """Thread-safe record of the checkpoints that this process verified, with monotonic times."""

    def __init__(self) -> None:
        self._verified_at: dict[str, float] = {}
        self._damaged: set[str] = set()
        self._lock = Lock()

    def add(self, name: str) -> None:
        """Record a checkpoint as verified now."""
        with self._lock:
            self._verified_at[name] = time.monotonic()

    def mark_damaged(self, name: str) -> None:
        """Record a checkpoint as damaged."""
        with self._lock:
            self._verified_at.pop(name, None)
            self._damaged.add(name)

    def forget(self, name: str) -> None:
        """Forget a name that is about to be written again."""
        with self._lock:
            self._verified_at.pop(name, None)
            self._damaged.discard(name)

    def is_damaged(self, name: str) -> bool:
        """Whether a checkpoint was found damaged."""
        with self._lock:
            return name in self._damaged

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._verified_at

    def verified_at(self, name: str) -> float:
        """Monotonic time of the last verification; -inf when never verified."""
        with self._lock:
            return self._verified_at.get(name, float("-inf"))


class Retention:
    """Retention policy of `directory`.

    - The newest `keep_optimizer_states` numbered checkpoints keep their optimizer states (0: all
      do).
    - The newest `keep_asked` checkpoints with a file KEEP stay as they are (None: all do).
    - `events` is told what goes.
    """

    def __init__(
        self,
        directory: Path,
        keep_optimizer_states: int,
        verified: VerifiedCheckpoints,
        keep_asked: int | None = None,
        events: SaveEvents | None = None,
    ):
        self.directory, self.keep, self.verified = directory, keep_optimizer_states, verified
        self.keep_asked, self.events = keep_asked, events or SaveEvents()

    def retire(self) -> None:
        """Drop and thin what the policy allows.

        Tries every checkpoint, then raises the first OSError: one that cannot be removed blocks no
        other.
        """
        paths = list_checkpoints(self.directory)
        asked = [path for path in paths if is_kept(path)]
        kept = asked if self.keep_asked is None else asked[max(0, len(asked) - self.keep_asked) :]
        # On-demand checkpoints never count towards the numbered ones that are kept.
        numbered = [path for path in paths if not is_on_demand(path)]
        old = numbered[: -self.keep] if self.keep > 0 else []
        actions: list[tuple[Callable[[Path], None], Path]] = [
            (self._expire, path)
            for path in paths
            if is_on_demand(path) and path not in kept and self._is_replaced(path, paths)
        ]
        actions += [
            (_thin, path)
            for path in old
            if path not in kept and (is_thinned(path) or self._is_replaced(path, paths))
        ]

        problem: OSError | UnavailableError | None = None
        # Try all of them: one that cannot be removed must not block the others.
        for action, path in actions:
            try:
                action(path)
            except (OSError, UnavailableError) as error:
                problem = problem or error

        if problem is not None:
            raise problem

        fault_injection.point("retire.done")

    def _expire(self, path: Path) -> None:
        was_kept = is_kept(path)
        _expire(path)
        why = f"{REMAIN} newer ones are verified"
        if was_kept:
            why += f", and of those that were asked for the newest {self.keep_asked} are kept"
        self.events.removed(path, why)

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
    # It no longer counts. Files that cannot be removed now are removed at the next start.
    shutil.rmtree(expired, ignore_errors=True)


def _thin(path: Path) -> None:
    if is_thinned(path):
        _remove_states(path)
        return

    try:
        manifest = read_manifest(path, fresh=True)
    except CheckpointError:
        # It was damaged in the meantime. Keep the rest, somebody may still need it.
        return

    mark_thinned(path, manifest)
    fault_injection.point("retire.marked")
    _remove_states(path)


def _remove_states(path: Path) -> None:
    """Remove the optimizer files of a thinned checkpoint, and the side files about them."""
    shutil.rmtree(path / "optimizer", ignore_errors=True)
    if (path / "optimizer").exists():
        # The next start tries again; until then the side files say what is left.
        return
    for file in (path / FACTS).glob("*optimizer-*.json"):
        with suppress(OSError):
            file.unlink()


def remove_unfinished(directory: Path) -> list[str]:
    """Delete unfinished checkpoints of a dead run; returns the names of the deleted directories.

    What somebody else put there under such a name stays, and so does what cannot be removed:
    tidying decides over no start. The caller holds the run's lock.
    """
    removed = []
    for path in list_retried(directory) if is_folder_retried(directory) else []:
        if not fnmatch(path.name, "ckpt_*.tmp"):
            continue
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
                removed.append(path.name)
    # Markers or manifests whose rename was prevented by a kill.
    for checkpoint in list_checkpoints(directory):
        with suppress(OSError):
            for path in () if checkpoint.is_symlink() else checkpoint.glob("*.tmp"):
                if path.is_file() and not path.is_symlink():
                    path.unlink()
    return removed


def set_aside_later(path: Path, attempt: int) -> list[str]:
    """Move checkpoints later than `path` aside, never deleting them; returns their names.

    They would collide with the new ones. The newest moves first: a kill in between leaves a history
    without a gap, and the next start moves the rest.
    """
    found = list_checkpoints(path.parent)
    later = found[found.index(path) + 1 :]
    set_aside = path.parent / f"set_aside_by_attempt_{attempt}"
    for checkpoint in reversed(later):
        fault_injection.point("start.aside")
        set_aside.mkdir(exist_ok=True)
        checkpoint.rename(set_aside / checkpoint.name)
    return [checkpoint.name for checkpoint in later]
