"""Drift detection: a slow rise of the loss that no single step shows.

- Every 16 accepted steps the median of the last 128 losses is compared with the best median of 512
  among the last 2,048. What lies more than one spread above it is added up; noise adds nothing.
- A warning for a person, and never a reason to undo steps: a change of the data looks the same.

Alternatives considered:
- A line through the last steps: its slope is decided by the few oldest and newest of them.
"""

from dataclasses import dataclass, field
from statistics import median

from k2train.guard.robust_baseline import Finite, Spread
from k2train.json_record import Positive

BLOCK = 16
"""Accepted steps between two looks."""
NEWEST_BLOCKS = 8
LEVEL_BLOCKS = 32
"""Blocks of a level that the newest are compared with."""
LEVELS = 96
"""Levels that are kept: with the blocks of the oldest, 2,048 steps."""
LEAST_SD = 0.01
"""Least spread, in nat: a rise of less than a hundredth is nobody's concern."""
LIMIT = 40.0


@dataclass(frozen=True)
class Rise:
    """A rise that was found: since when, from where, to where."""

    since: int
    usual_loss: float
    recent_loss: float


@dataclass
class Drift:
    """Cumulative sum of how far the newest losses are above the best level."""

    block: list[Finite] = field(default_factory=list)
    """Losses of the block that is not full yet."""
    medians: list[Finite] = field(default_factory=list)
    levels: list[Finite] = field(default_factory=list)
    score: Finite = 0.0
    since: Positive | None = None
    """First step of the rise that is being added up."""
    warned: bool = False

    def observe(self, step: int, loss: float, sd: Spread) -> Rise | None:
        """Add an accepted step; `sd` is the spread of the losses. Returns a rise, told once."""
        self.block.append(loss)
        if len(self.block) < BLOCK:
            return None

        self.medians = [*self.medians, median(self.block)][-LEVEL_BLOCKS:]
        self.block = []
        if len(self.medians) < LEVEL_BLOCKS:
            return None

        self.levels = [*self.levels, median(self.medians)][-LEVELS:]
        newest, best = median(self.medians[-NEWEST_BLOCKS:]), min(self.levels)
        excess = (newest - best) / max(sd, LEAST_SD) - 1.0
        self.score = min(max(0.0, self.score + excess), 2 * LIMIT)
        if self.score == 0.0:
            self.since, self.warned = None, False
            return None

        self.since = self.since or step
        if self.warned or self.score <= LIMIT:
            return None
        self.warned = True
        return Rise(self.since, best, newest)
