"""Disk space for checkpoints: bytes of one, bytes of the whole plan, bytes free. No torch.

- The plan is checked at the start. A run that finds the disk too small at its hundredth checkpoint
  has lost the days since the ninety-ninth.
- Each save is checked again, because other jobs write to the same disk.

Alternatives considered:
- Reserving the space ahead (fallocate): file systems of clusters do not keep that promise.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from k2train.errors import RunError
from k2train.retry import retried
from k2train.text import bytes_text

STATE_BYTES = 12
"""Bytes per parameter of the optimizer states: fp32 master weight and both moments."""
BLOCK_FACTS_BYTES = 520
"""Bytes per block besides its values: its entries in the file's header and in the manifest."""
MANIFEST_BYTES = 16384
"""Bytes of a manifest besides its tensors: config, data, environment."""


def free_bytes(path: Path) -> int:
    """Bytes that may be written below `path`, or below its nearest existing parent.

    Raises OSError.
    """
    while True:
        try:
            facts = os.statvfs(path)
            break
        except (FileNotFoundError, NotADirectoryError):
            if path == path.parent:
                raise
            path = path.parent
    return facts.f_bavail * facts.f_frsize


@dataclass(frozen=True)
class CheckpointBytes:
    """Size of one checkpoint in bytes.

    `tensors` counts global tensors; `parts` is the number of blocks each is cut into (tp x dp).
    """

    parameters: int
    weight_bytes: int
    tensors: int = 0
    parts: int = 1

    @property
    def thinned(self) -> int:
        """Bytes of the weights and of the manifest, which still describes the optimizer files."""
        manifest = MANIFEST_BYTES + self.tensors * self.parts * 4 * BLOCK_FACTS_BYTES
        return self.parameters * self.weight_bytes + manifest

    @property
    def states(self) -> int:
        """Bytes of the optimizer states."""
        return self.parameters * STATE_BYTES

    @property
    def whole(self) -> int:
        """Bytes of a complete checkpoint."""
        return self.thinned + self.states


def plan_bytes(
    one: CheckpointBytes,
    remaining: int,
    keep_optimizer_states: int,
    complete_now: int,
    inside_chunks: int = 0,
) -> int:
    """Peak number of bytes that the `remaining` numbered checkpoints add.

    Counts weights for all of them, and optimizer states for those kept plus the one being written.
    `complete_now` existing checkpoints still have their states; thinning frees those.
    `inside_chunks` complete ones come on top: those saved inside chunks that exist at once.
    """
    states = complete_now + remaining
    if keep_optimizer_states > 0:
        # One more than is kept, because thinning waits for the next complete checkpoint.
        states = min(states, keep_optimizer_states + 1)
    numbered = remaining * one.thinned + max(0, states - complete_now) * one.states
    return numbered + inside_chunks * one.whole


def check_plan(
    directory: Path,
    one: CheckpointBytes,
    remaining: int,
    keep_optimizer_states: int,
    complete_now: int = 0,
    inside_chunks: int = 0,
) -> None:
    """Raise RunError when `directory` has no space for the remaining checkpoints.

    Numbered ones, and `inside_chunks` at a time that are saved inside chunks.
    """
    needed = plan_bytes(one, remaining, keep_optimizer_states, complete_now, inside_chunks)
    free = retried(lambda: free_bytes(directory), directory)
    if needed > free:
        # 0 keeps the optimizer states of every checkpoint.
        kept = "all" if keep_optimizer_states == 0 else str(keep_optimizer_states)
        inside = f" and {inside_chunks} inside chunks" if inside_chunks else ""
        knob = "set checkpoint.every_seconds=0, " if inside_chunks else ""
        raise RunError(
            f"no space for the {remaining} checkpoints of this run{inside}: they need "
            f"{bytes_text(needed)} ({bytes_text(one.thinned)} each, with optimizer states "
            f"{bytes_text(one.whole)}, kept for {kept}), {bytes_text(free)} are free in "
            f"{directory}; free space, {knob}raise checkpoint.every_chunks, lower "
            "checkpoint.keep_optimizer_states (2 at least), move run.directory, or start anyway "
            "with run.allow=[space]"
        )


def room_problem(directory: Path, name: str, needed: int) -> str | None:
    """One line when `directory` has no space for a checkpoint of `needed` bytes, else None.

    Raises OSError.
    """
    free = free_bytes(directory)
    if needed <= free:
        return None
    return (
        f"no space for {name}: needs {bytes_text(needed)}, {bytes_text(free)} are free in "
        f"{directory}; free space there or move run.directory"
    )
