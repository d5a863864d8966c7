"""What a replay is asked for, and the segments of a run that it means. No torch."""

import random
from typing import NamedTuple

from k2train.checkpoint.manifest import checkpoint_order, is_thinned
from k2train.errors import RunError
from k2train.replay.recorded_run import (
    RecordedRun,
    Segment,
    segment_of_chunk,
    segment_of_steps,
)
from k2train.text import counted


class Request(NamedTuple):
    """What is asked for: one of them, and `layer` or `seed` beside it."""

    chunk: int | None = None
    steps: tuple[int, int] | None = None
    resume_drill: int | None = None
    probe: int | None = None
    seed: int = 0
    layer: int | None = None
    """With `chunk`: only this layer, from the files alone."""
    prompt: int | None = None
    """The forward check of this checkpoint, layer by layer."""
    first_only: bool = False
    """With `chunk`: only its first step."""

    def segments(self, run: RecordedRun) -> list[Segment]:
        """Return what to replay. Raises UserError for what is not on record."""
        if self.chunk is not None:
            found = segment_of_chunk(run, self.chunk)
            return [Segment(found.begin, found.first, found.first) if self.first_only else found]
        if self.steps is not None:
            return [segment_of_steps(run, *self.steps)]
        if self.probe is not None:
            return [segment_of_chunk(run, number) for number in self.drawn(run, self.probe)]
        return []

    def drawn(self, run: RecordedRun, count: int) -> list[int]:
        """Draw different chunks among those that can be replayed, in the order of the draw.

        Raises RunError when there are fewer.
        """
        whole = {
            checkpoint_order(path.name)[0]
            for path in run.checkpoints
            if not is_thinned(path) and checkpoint_order(path.name)[1] == 0
        }
        known = sorted(number for number in whole if number > 0 and number - 1 in whole)
        if count > len(known):
            raise RunError(
                f"--probe {count}: {run.directory} has {counted(len(known), 'chunk')} whose "
                "checkpoints before and after are whole; ask for fewer"
            )
        return random.Random(self.seed).sample(known, count)
