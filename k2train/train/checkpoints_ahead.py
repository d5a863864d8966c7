"""Checkpoints that a start will write: which they are, whether they fit on the disk, their names.

- Decided before anything is written. A run that cannot save would train a chunk for nothing.
- The numbers follow the checkpoint that is taken; what follows it on the disk is set aside.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from k2train.checkpoint.disk_space import CheckpointBytes, check_plan
from k2train.checkpoint.manifest import (
    checkpoint_name,
    checkpoint_order,
    is_thinned,
    list_checkpoints,
)
from k2train.checkpoint.retention import ON_DEMAND_AT_ONCE, is_kept, is_on_demand
from k2train.errors import RunError
from k2train.plan.cost import parameters, tensor_count
from k2train.retry import is_folder_retried, list_retried
from k2train.train.setup import Setup


@dataclass(frozen=True)
class CheckpointsAhead:
    """What a start will save, after the checkpoint that it takes."""

    setup: Setup
    folder: Path
    """Of the run's checkpoints."""
    num_chunks: int
    taken: Path | None
    """Checkpoint that the run continues from; None for a fresh start."""
    step: int

    def numbers(self) -> list[int]:
        """Numbers of the checkpoints at chunks' ends that follow the one that is taken."""
        every, last = self.setup.config.checkpoint.every_chunks, self.num_chunks
        # By its name: the end of a chunk that is not scored yet gets its number then.
        taken = checkpoint_order(self.taken.name)[0] if self.taken else 0
        following = range(taken + 1, last + 1)
        return [n for n in following if n % every == 0 or n == last]

    def check_names(self) -> None:
        """Raise RunError when something that is no checkpoint has the name of a later one.

        The run would train the whole chunk before it, and fail to save it, at every start.
        """
        numbers = [*([0] if self.step == 0 else []), *self.numbers()]
        if not is_folder_retried(self.folder):
            return
        there = {path.name: path for path in list_retried(self.folder)}
        for name in map(checkpoint_name, numbers):
            if name in there and not is_folder_retried(there[name]):
                raise RunError(
                    f"{there[name]} is no checkpoint, but {name} is to be saved there; move it away"
                )

    def check_space(self) -> bool:
        """Raise RunError when the disk cannot hold the checkpoints that follow.

        Returns whether there is space for those inside chunks, where `auto` may do without them.
        """
        layout, shape = self.setup.layout, self.setup.architecture
        settings = self.setup.config.checkpoint
        found = self._kept()
        numbered = [path for path in found if not is_on_demand(path)]
        complete = sum(not is_thinned(path) for path in numbered)

        one = CheckpointBytes(
            parameters(shape),
            weight_bytes=2 if self.setup.config.precision == "bf16" else 4,
            tensors=tensor_count(shape),
            parts=layout.tensor * layout.data,
        )
        remaining = len(self.numbers()) + (self.step == 0 and not numbered)
        keep, every_seconds = settings.keep_optimizer_states, settings.every_seconds
        inside = _more_inside_chunks(found)
        if every_seconds == "auto":
            check_plan(self.folder, one, remaining, keep, complete)
        try:
            inside = 0 if every_seconds == 0 else inside
            check_plan(self.folder, one, remaining, keep, complete, inside)
        except RunError:
            if every_seconds != "auto":
                raise
            return False
        return True

    def _kept(self) -> list[Path]:
        """Checkpoints up to the one that is taken; what follows it gives no space back."""
        found = list_checkpoints(self.folder)
        return found[: found.index(self.taken) + 1] if self.taken else found


def _more_inside_chunks(found: Iterable[Path]) -> int:
    """Checkpoints inside chunks that are to come besides those that exist.

    These take no more space, and are replaced, unless somebody asked for them.
    """
    replaced = sum(is_on_demand(path) and not is_kept(path) for path in found)
    return max(0, ON_DEMAND_AT_ONCE - replaced)
