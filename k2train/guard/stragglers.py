"""Straggler detection: compare each rank's own seconds per step with those of its peers.

- Own seconds exclude the time blocked in collectives, where one slow rank delays all.
- On CUDA they are seconds of the device (`parallel.own_time`): a slow device is found, and a slow
  host where its device has to wait for it. On a CPU they are seconds of the host.
- Ranks of one pipeline stage do the same work and are compared directly. A stage with one rank is
  compared with the others by its expected share of the work. That comparison has a larger margin,
  because a share is an estimate.
- A rank is slow when nearly all of its last steps are: the second shortest of 20 is well above the
  shortest third of its peers' steps. Noise of a busy machine only ever lengthens some steps. It
  moves means and even medians, but seldom this order statistic.
- Two rules: well above the others, or clearly above this rank's own usual ratio to them. The second
  rule spares a rank that always has slightly more work.
- One rank observes for all, in arrays: the step waits for it. A rank is reported once when it
  becomes slow and once when it recovers.

Alternatives considered:
- Mean and standard deviation: one pause of a second hides everything.
- Wall time of a step: equal on all ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from k2train.plan.layout import Layout

WINDOW = 20
OWN_ORDER = 1
"""Index of the order statistic of a rank: so many steps of its window may be fast."""
PEER_ORDER = 8
"""Index of the order statistic of its peers: their time on a quiet machine.

Noise on all ranks would move their median.
"""
SAME_STAGE = 1.25
OTHER_STAGE = 1.75
OWN_PAST = 1.2
PAST_STEPS = 256
ENOUGH_PAST = 64
LARGE_GROUP = 16
MIN_EXCESS_SECONDS = 0.005
"""Smallest excess over the peers that is reported."""


Array = npt.NDArray[np.float64]


class _Slow(NamedTuple):
    """A rank that is slow."""

    since: int
    usual: float | None
    """Usual ratio at the time when it became slow by its own past."""


class Stragglers:
    """Observes every rank's own seconds per step and reports ranks that become slow or recover.

    - `weights`: each rank's expected part of the work, in any unit (None: all equal).
    - `hosts`: host names for the messages.
    """

    def __init__(
        self,
        layout: Layout,
        weights: Sequence[float] | None = None,
        hosts: Sequence[str] | None = None,
    ):
        world = layout.world_size
        weights = [1.0] * world if weights is None else weights
        assert len(weights) == world, f"{len(weights)} weights for {world} ranks"
        self._hosts = hosts
        mean = sum(weights) / world
        self._share = np.array(
            [weight / mean if mean > 0 and weight > 0 else 1.0 for weight in weights]
        )
        stages: dict[int, list[int]] = {}
        for rank in range(world):
            stages.setdefault(layout.coordinate(rank).pp, []).append(rank)

        # A stage with one rank has no peers of its own: compare all ranks by their share of the
        # work.
        alone = any(len(ranks) == 1 for ranks in stages.values())
        self._groups = [list(range(world))] if alone else list(stages.values())
        self._factor = OTHER_STAGE if alone and len(stages) > 1 else SAME_STAGE

        self._steps = 0
        self._window = np.zeros((world, WINDOW))
        """Own seconds of the last steps for a full share of the work, in a ring."""
        self._ratios = np.zeros((world, WINDOW))
        """Their ratio to the others' median of that step."""
        self._past, self._num_past = np.zeros((world, PAST_STEPS)), np.zeros(world, np.int64)
        """Ratios of earlier steps in a ring for each rank, and how many there were."""
        self._slow: dict[int, _Slow] = {}

    def observe(self, step: int, seconds: Sequence[float]) -> str | None:
        """Observe the own seconds of each rank in `step`; returns a message, mostly None."""
        world = len(self._share)
        assert len(seconds) == world, f"{len(seconds)} times for {world} ranks"
        if world < 2:
            return None

        self._record_step(np.asarray(seconds, np.float64) / self._share)
        if self._steps < WINDOW:
            return None
        ordered = np.partition(self._window, (OWN_ORDER, PEER_ORDER), axis=1)
        low, others = ordered[:, OWN_ORDER], self._others(ordered[:, PEER_ORDER])

        # Far above its peers or its own past: both need a real excess, which few ranks have.
        named = set(np.flatnonzero(low - others >= MIN_EXCESS_SECONDS).tolist()) | {*self._slow}
        found = (self._evaluate(rank, step, low[rank], others[rank]) for rank in sorted(named))
        return "; ".join(filter(None, found)) or None

    def _record_step(self, now: Array) -> None:
        at = self._steps % WINDOW
        if self._steps >= WINDOW:
            # Steps that leave the window form a rank's usual ratio, unless it is slow.
            ranks = np.ones(len(now), bool)
            ranks[[*self._slow]] = False
            ranks = np.flatnonzero(ranks)
            self._past[ranks, self._num_past[ranks] % PAST_STEPS] = self._ratios[ranks, at]
            self._num_past[ranks] += 1
        self._window[:, at] = now
        self._ratios[:, at] = now / np.maximum(self._others(now), 1e-6)
        self._steps += 1

    def _evaluate(self, rank: int, step: int, low: float, others: float) -> str:
        slow = self._slow.get(rank)
        if slow is None:
            far_above = low > self._factor * others
            usual = self._usual(rank, only_if_high=not far_above)
            if not far_above and (usual is None or low <= OWN_PAST * usual * others):
                return ""

            self._slow[rank] = _Slow(step, usual)
            return (
                f"{self._name(rank)} is slow: {self._own_seconds(rank) * 1e3:.0f} ms of own work "
                f"per step, the others take {others * self._share[rank] * 1e3:.0f} ms (last "
                f"{WINDOW} steps)"
            )

        # Recovered when most steps are well below the level that made it slow. At the threshold
        # itself the state would flip back and forth.
        level = np.median(self._window[rank])
        usual_level = others * max(1.0, slow.usual or 1.0)
        if level < max(usual_level * (1 + OWN_PAST) / 2, others + MIN_EXCESS_SECONDS / 2):
            del self._slow[rank]
            return f"{self._name(rank)} is no longer slow, after {step - slow.since} steps"

        return ""

    def _usual(self, rank: int, only_if_high: bool) -> float | None:
        """Usual ratio of a rank to the others; None without enough past.

        `only_if_high`: also None unless most of its window is above that ratio by OWN_PAST.
        """
        count = min(int(self._num_past[rank]), PAST_STEPS)
        if count < ENOUGH_PAST:
            return None
        usual = float(np.median(self._past[rank, :count]))
        if not only_if_high:
            return usual
        ratio = np.sort(self._ratios[rank])[OWN_ORDER]
        return usual if ratio > OWN_PAST * usual else None

    def _others(self, values: Array) -> Array:
        """Median of the others of its group for each rank.

        In a large group, the median of all values, which is the same.
        """
        found = np.empty_like(values)
        for group in self._groups:
            part = values[group]
            if len(group) > LARGE_GROUP:
                found[group] = np.median(part)
            else:
                found[group] = [np.median(np.delete(part, n)) for n in range(len(group))]
        return found

    def _own_seconds(self, rank: int) -> float:
        return float(np.median(self._window[rank]) * self._share[rank])

    def _name(self, rank: int) -> str:
        return f"rank {rank}" if self._hosts is None else f"rank {rank} ({self._hosts[rank]})"
