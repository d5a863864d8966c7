"""Room for checkpoints: what one takes, what a whole plan of them takes, and what is free. No torch.

A run that finds out at its hundredth checkpoint that the disk is too small has lost the days since the ninety-ninth. The
plan is checked at the start; each save is checked again, since others write to the same disk. Reserving the space ahead
(fallocate) was refused: file systems of clusters do not keep that promise.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from k2train.errors import RunError
from k2train.text import bytes_text

STATE_BYTES = 12
"""Bytes a parameter of the optimizer's states: fp32 master weight and both moments."""
BLOCK_FACTS_BYTES = 520
"""Bytes a block of a tensor takes beside its values: in the header of its file, and in the manifest."""
MANIFEST_BYTES = 16384
"""Bytes of a manifest beside its tensors: config, data, environment."""


def free_bytes(path: Path) -> int:
    """Bytes that may be written below `path`, or below its nearest parent that exists. Raises OSError."""
    while not path.exists() and path != path.parent:
        path = path.parent
    facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


@dataclass(frozen=True)
class CheckpointBytes:
    """What one checkpoint takes; `tensors` counts global tensors, `parts` into how many blocks each is cut (tp x dp)."""

    parameters: int
    weight_bytes: int
    tensors: int = 0
    parts: int = 1

    @property
    def thinned(self) -> int:
        """Weights, and the manifest, which keeps the facts of the optimizer's files."""
        manifest = MANIFEST_BYTES + self.tensors * self.parts * 4 * BLOCK_FACTS_BYTES
        return self.parameters * self.weight_bytes + manifest

    @property
    def states(self) -> int:
        return self.parameters * STATE_BYTES

    @property
    def whole(self) -> int:
        return self.thinned + self.states


def plan_bytes(
    one: CheckpointBytes, remaining: int, keep_optimizer_states: int, complete_now: int
) -> int:
    """Bytes that the `remaining` numbered checkpoints add at the highest: weights for all, optimizer states for those kept
    and for the one in flight. `complete_now` of those on the disk have their states still; thinning gives them back.
    """
    states = complete_now + remaining
    if keep_optimizer_states > 0:
        states = min(states, keep_optimizer_states + 1)
    return remaining * one.thinned + max(0, states - complete_now) * one.states


def check_plan(
    directory: Path,
    one: CheckpointBytes,
    remaining: int,
    keep_optimizer_states: int,
    complete_now: int = 0,
) -> None:
    """Raises RunError when the disk of `directory` has no room for the numbered checkpoints still to come."""
    needed = plan_bytes(one, remaining, keep_optimizer_states, complete_now)
    free = free_bytes(directory)
    if needed > free:
        kept = "all" if keep_optimizer_states == 0 else str(keep_optimizer_states)
        raise RunError(
            f"no space for the {remaining} checkpoints of this run: they need {bytes_text(needed)} "
            f"({bytes_text(one.thinned)} each, with optimizer states {bytes_text(one.whole)}, kept "
            f"for {kept}), "
            f"{bytes_text(free)} are free in {directory}; free space, raise "
            "checkpoint.every_chunks, lower "
            "checkpoint.keep_optimizer_states (2 at least), move run.directory, or start anyway "
            "with "
            "run.allow=[space]"
        )


def room_problem(directory: Path, name: str, needed: int) -> str | None:
    """One line when `directory` has no room for a checkpoint of `needed` bytes. Raises OSError."""
    free = free_bytes(directory)
    if needed <= free:
        return None
    return (
        f"no space for {name}: needs {bytes_text(needed)}, {bytes_text(free)} are free in "
        f"{directory}; free space there "
        "or move run.directory"
    )
