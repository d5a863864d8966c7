"""Choosing the checkpoint to resume from: the newest that all ranks find whole, however far back.

- All ranks agree before a value is changed. What a load refuses leads to the one before.
- The message of a failed choice names what was tried and why it was refused, and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train import fault_injection
from k2train.checkpoint.load import agree_on_checkpoint
from k2train.checkpoint.manifest import CheckpointManifest, read_manifest
from k2train.checkpoint.verify import no_progress
from k2train.data.order import ChunkOrder
from k2train.errors import CheckpointError
from k2train.parallel.grid import ProcessGrid
from k2train.text import counted
from k2train.train.preflight import Start
from k2train.train.resume_check import check_same_run
from k2train.train.start_point import is_unscored_end

SHOWN = 3
"""Refused checkpoints that a message names, newest first."""


@dataclass(frozen=True)
class Chosen:
    """Checkpoint that all ranks verified and agreed on; none for a fresh start."""

    path: Path | None
    manifest: CheckpointManifest | None
    refused: tuple[str, ...] = ()
    """Reasons why newer ones were refused."""
    allowed: tuple[str, ...] = ()
    """Differences from the checkpoint's run that `run.allow` permits by name."""

    @property
    def step(self) -> int:
        """Step to continue from."""
        return 0 if self.manifest is None else self.manifest.step

    def finishes(self, order: ChunkOrder) -> bool:
        """Whether the stage is finished with it: nothing to train, and nothing to score."""
        if self.manifest is None or is_unscored_end(self.manifest):
            return False
        return self.step >= order.total_steps


def choose_checkpoint(
    start: Start, grid: ProcessGrid, progress: Callable[[], None] = no_progress
) -> Chosen:
    """Agree on the checkpoint to resume from; collective. `progress` is called while it reads.

    What its files hold is checked when it is loaded, see `choose_next`; if the stage ends with it,
    here. Raises CheckpointError when no candidate is whole or of this run, or the one of
    `run.init_from` is not whole.
    """
    chosen = _choose(start, grid, start.candidates, start.refused, progress)
    if start.parent is not None:
        parent, problems = agree_on_checkpoint(
            [start.parent], grid, progress=progress, to_load=True
        )
        if parent is None:
            raise CheckpointError(f"run.init_from: {problems[0]}")
    return chosen


def choose_next(
    start: Start,
    grid: ProcessGrid,
    refused: Chosen,
    problem: str,
    progress: Callable[[], None] = no_progress,
) -> Chosen:
    """Choose among the candidates after one that a load refused because of `problem`; collective.

    Raises CheckpointError when none of them is whole or of this run.
    """
    assert refused.path is not None, "a load refuses a checkpoint"
    known = list(start.candidates)
    # Rank 0's list counts; another rank's may lack what its file system does not show yet.
    older = known[known.index(refused.path) + 1 :] if refused.path in known else []
    return _choose(start, grid, older, (*refused.refused, problem), progress)


def _choose(
    start: Start,
    grid: ProcessGrid,
    candidates: Sequence[Path],
    refused: Sequence[str],
    progress: Callable[[], None],
) -> Chosen:
    """Agree on the first of `candidates`; `refused` are the problems of newer ones."""
    path, problems = agree_on_checkpoint(
        candidates, grid, start.resume_check, progress, to_load=True
    )
    fault_injection.point("start.agreed")

    refused = (*refused, *problems)
    if path is None:
        if start.candidates:
            raise CheckpointError(_none_whole(start, refused))
        return Chosen(None, None, refused)

    allow, then = start.setup.config.run.allow, start.identity_at(path)
    allowed = check_same_run(path, start.identity, allow, then)
    chosen = Chosen(path, read_manifest(path), refused, tuple(allowed))
    if not chosen.finishes(start.order):
        return chosen

    # Nothing will be loaded, so its content is checked now.
    whole, problems = agree_on_checkpoint([path], grid, progress=progress)
    return chosen if whole else choose_next(start, grid, chosen, problems[0], progress)


def _none_whole(start: Start, refused: Sequence[str]) -> str:
    """Say what was tried, and why it was refused."""
    asked = len(start.candidates) == 1 and isinstance(start.setup.config.run.resume, int)
    tried = (
        f"the {counted(len(refused), 'checkpoint')} with optimizer states in {start.checkpoints}"
    )
    more = len(refused) - SHOWN
    return (
        (
            f"{start.candidates[0]} (run.resume) is not whole: "
            if asked
            else f"none of {tried} is whole: "
        )
        + "; ".join(refused[:SHOWN])
        + (f"; and {more} more" if more > 0 else "")
        + "; restore one of them, or start anew under another run.name"
    )
