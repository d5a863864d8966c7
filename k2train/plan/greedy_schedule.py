"""Searched zero-bubble schedule: seconds and held micro-batches of each rank, by greedy choice.

- The published ZB-1p and ZB-2p are no fixed lists. A search orders each rank's actions for the
  times that were measured, and a limit of held micro-batches bounds its memory (Qi et al. 2023,
  arXiv:2401.10241, section 3: limits of p and 2p).
- Greedy: a rank takes an input gradient that has arrived, else a forward under the limit, else a
  weight gradient. It waits only for what comes before half of a weight gradient would end.
- As in the published search, forwards and input gradients alternate once the first gradient is
  there. A rank that could run ahead to its limit would delay the gradients of the ranks before it.

Alternatives considered:
- The handcrafted ZB-H1 and ZB-H2: they are made for three equal times, and leave bubbles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of one stage's passes over a micro-batch."""

    forward: float
    backward_input: float
    backward_weight: float


@dataclass
class _Rank:
    """What one rank has done, and when its inputs arrive."""

    own: StageSeconds
    forwards: list[float]
    """Arrival of each micro-batch's forward input; its length is what has been sent so far."""
    gradients: list[float] = field(default_factory=list)
    done: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Forwards, input gradients and weight gradients."""
    ahead: float = math.inf
    """Most micro-batches between a forward and its input gradient."""
    free: float = 0.0
    began: float = math.inf

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Seconds of each kind of action."""
        return self.own.forward, self.own.backward_input, self.own.backward_weight

    def choice(self, count: int, limit: float, kept: float) -> tuple[float, int]:
        """(start, kind) of the next action: 0 forward, 1 input, 2 weight; start inf for none."""
        f, b, w = self.done
        ahead = [math.inf, math.inf]
        fits = f - b + 1 <= self.ahead and f - b + kept * (b - w) + 1 <= limit
        if f < count and f < len(self.forwards) and fits:
            ahead[0] = max(self.free, self.forwards[f])
        if b < f and b < len(self.gradients):
            ahead[1] = max(self.free, self.gradients[b])

        kind = 1 if ahead[1] <= ahead[0] else 0
        if w < b and ahead[kind] > self.free + self.own.backward_weight / 2:
            return self.free, 2
        return ahead[kind], kind


@lru_cache(maxsize=1024)
def greedy_seconds(
    stages: tuple[StageSeconds, ...], transfer: float, count: int, limit: float, kept: float
) -> float:
    """Longest time of a single rank, from its first action to its last.

    - `limit`: micro-batches whose activations a rank may hold; `kept`: the share of a micro-batch's
      activations that its weight gradient still needs.
    - Ranks begin a step while others end the one before it (section 4 of the paper).
    """
    ranks = _ranks(stages, count, limit)
    for _ in _actions(ranks, transfer, count, limit, kept):
        pass
    return max(rank.free - rank.began for rank in ranks)


def greedy_held(
    stages: tuple[StageSeconds, ...], transfer: float, count: int, limit: float, kept: float
) -> tuple[float, ...]:
    """Most micro-batches whose activations each rank holds at once; arguments as above."""
    changes = (1.0, kept - 1.0, -kept)
    held, most = [0.0] * len(stages), [0.0] * len(stages)
    for index, kind in _actions(_ranks(stages, count, limit), transfer, count, limit, kept):
        held[index] += changes[kind]
        most[index] = max(most[index], held[index])
    return tuple(most)


def _ranks(stages: tuple[StageSeconds, ...], count: int, limit: float) -> list[_Rank]:
    """Ranks before their first action.

    A limit of p lets the last rank be 1 ahead and each one before it 1 more, as 1F1B; 2p lets it
    be 2 more, as ZB-H2.
    """
    p = len(stages)
    ranks = [_Rank(own, [0.0] * count if i == 0 else []) for i, own in enumerate(stages)]
    for i, rank in enumerate(ranks):
        rank.ahead = 1 + limit / p * (p - 1 - i)
    return ranks


def _actions(
    ranks: list[_Rank], transfer: float, count: int, limit: float, kept: float
) -> Iterator[tuple[int, int]]:
    """Yield (rank, kind) of every action, and run it: 0 forward, 1 input, 2 weight gradient."""
    last = len(ranks) - 1
    choices = [rank.choice(count, limit, kept) for rank in ranks]
    for _ in range(3 * count * len(ranks)):
        start, kind, index = min((*choice, i) for i, choice in enumerate(choices))
        assert start < math.inf, f"a limit of {limit:g} micro-batches lets no rank go on"

        rank, other = ranks[index], index
        rank.began = min(rank.began, start)
        rank.free = start + rank.seconds[kind]
        rank.done[kind] += 1
        if kind == 0 and index == last:
            rank.gradients.append(rank.free)
        elif kind == 0:
            other = index + 1
            ranks[other].forwards.append(rank.free + transfer)
        elif kind == 1 and index:
            other = index - 1
            ranks[other].gradients.append(rank.free + transfer)
        yield index, kind
        # Only these two have something new to choose from.
        for changed in {index, other}:
            choices[changed] = ranks[changed].choice(count, limit, kept)
