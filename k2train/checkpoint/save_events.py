"""Save events and save policy: what a run is told of its checkpoints, and how they are saved."""

from dataclasses import dataclass
from pathlib import Path

from k2train.checkpoint.manifest import CheckpointManifest


@dataclass(frozen=True)
class SavePolicy:
    """How checkpoints are saved.

    - The newest `keep_optimizer_states` numbered checkpoints keep their states (0: all do).
    - Of those that were asked for, the newest `keep_asked` stay as they are (None: all do).
    - `asynchronous`: training goes on while files are written.
    - A save that the disk refuses is tried again for `retry_seconds`.
    - An older checkpoint is read again every `verify_every_seconds` (0: never).
    """

    keep_optimizer_states: int = 0
    asynchronous: bool = True
    retry_seconds: float = 0.0
    verify_every_seconds: float = 0.0
    keep_asked: int | None = None


class SaveEvents:
    """Receiver of what happens to checkpoints, on rank 0. This one ignores all of it.

    - All methods but `idle` are called from the saving or the scrubbing thread.
    - An OSError of `message`, `verified`, `damaged` or `removed` is logged, and the save continues.
      Any other error is raised on every rank.
    """

    def check_owner(self) -> None:
        """Called before the rename; raises RunError when the run has another owner."""

    def committed(self, path: Path, manifest: CheckpointManifest) -> None:
        """A checkpoint has its name."""

    def verified(self, path: Path) -> None:
        """A checkpoint was read back intact."""

    def damaged(self, path: Path, problem: str) -> None:
        """A checkpoint is no longer what was written."""

    def removed(self, path: Path, why: str) -> None:
        """A checkpoint inside a chunk was removed."""

    def message(self, text: str) -> None:
        """A line for people."""

    def idle(self) -> None:
        """Called repeatedly by the thread that waits for a save."""
