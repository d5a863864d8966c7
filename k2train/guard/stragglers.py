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
- Every rank observes the same numbers and gets the same answer. A rank is reported once when it
  becomes slow and once when it recovers.

Alternatives considered:
- Mean and standard deviation: one pause of a second hides everything.
- Wall time of a step: equal on all ranks.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

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


class _Rank:
    def __init__(self) -> None:
        self.window: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """(seconds, ratio to the others' median of that step), both for a full share of the work.
        """
        self.past: deque[float] = deque(maxlen=PAST_STEPS)
        self.since: int | None = None
        self.usual: float | None = None
        """Usual ratio at the time when it became slow by the second rule."""

    def ordered_seconds(self) -> list[float]:
        """Seconds of the window, shortest first."""
        return sorted(value for value, _ in self.window)


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
        self._share = [weight / mean if mean > 0 and weight > 0 else 1.0 for weight in weights]
        stages: dict[int, list[int]] = {}
        for rank in range(world):
            stages.setdefault(layout.coordinate(rank).pp, []).append(rank)

        # A stage with one rank has no peers of its own: compare all ranks by their share of the
        # work.
        alone = any(len(ranks) == 1 for ranks in stages.values())
        self._groups = [list(range(world))] if alone else list(stages.values())
        self._factor = OTHER_STAGE if alone and len(stages) > 1 else SAME_STAGE
        self._ranks = [_Rank() for _ in range(world)]

    def observe(self, step: int, seconds: Sequence[float]) -> str | None:
        """Observe the own seconds of each rank in `step`; returns a message, mostly None."""
        assert len(seconds) == len(self._ranks), (
            f"{len(seconds)} times for {len(self._ranks)} ranks"
        )
        messages = []
        for group in self._groups:
            if len(group) < 2:
                continue

            self._record_step(group, seconds)
            # Computed after the whole group was recorded: every rank is compared with the same
            # window.
            ordered = {rank: self._ranks[rank].ordered_seconds() for rank in group}
            others = _others(
                {rank: found[min(PEER_ORDER, len(found) - 1)] for rank, found in ordered.items()}
            )
            for rank in group:
                message = self._evaluate(rank, step, ordered[rank], others[rank])
                if message:
                    messages.append(message)

        return "; ".join(messages) or None

    def _record_step(self, group: Sequence[int], seconds: Sequence[float]) -> None:
        now = {rank: seconds[rank] / self._share[rank] for rank in group}
        others = _others(now)
        for rank in group:
            state = self._ranks[rank]
            if len(state.window) == WINDOW and state.since is None:
                # Steps that leave the window form the rank's usual ratio, unless it is slow.
                state.past.append(state.window[0][1])
            state.window.append((now[rank], now[rank] / max(others[rank], 1e-6)))

    def _evaluate(self, rank: int, step: int, ordered: Sequence[float], others: float) -> str:
        state = self._ranks[rank]
        if len(state.window) < WINDOW:
            return ""

        low = ordered[OWN_ORDER]
        if state.since is None:
            # First rule: far above the peers. Second rule: far above its own past. Both need a real
            # excess. Every rank does this for all ranks after every step, so what decides for most
            # of them comes first.
            if low - others < MIN_EXCESS_SECONDS:
                return ""
            far_above = low > self._factor * others
            usual = self._usual(state, only_if_high=not far_above)
            if not far_above and (usual is None or low <= OWN_PAST * usual * others):
                return ""

            state.since, state.usual = step, usual
            return (
                f"{self._name(rank)} is slow: {self._own_seconds(rank) * 1e3:.0f} ms of own work "
                f"per step, the others take {others * self._share[rank] * 1e3:.0f} ms (last "
                f"{WINDOW} steps)"
            )

        # Recovered when most steps are well below the level that made it slow. At the threshold
        # itself the state would flip back and forth.
        level = median(value for value, _ in state.window)
        usual_level = others * max(1.0, state.usual or 1.0)
        if level < max(usual_level * (1 + OWN_PAST) / 2, others + MIN_EXCESS_SECONDS / 2):
            since, state.since = state.since, None
            return f"{self._name(rank)} is no longer slow, after {step - since} steps"

        return ""

    @staticmethod
    def _usual(state: _Rank, only_if_high: bool) -> float | None:
        """Usual ratio of a rank to the others; None without enough past.

        `only_if_high`: also None unless most of its window is above that ratio by OWN_PAST.
        """
        if len(state.past) < ENOUGH_PAST:
            return None
        if not only_if_high:
            return median(state.past)
        ratio = sorted(value for _, value in state.window)[OWN_ORDER]
        # No median is below the least, and that is found faster.
        if ratio <= OWN_PAST * min(state.past):
            return None
        usual = median(state.past)
        return usual if ratio > OWN_PAST * usual else None

    def _own_seconds(self, rank: int) -> float:
        return median(value for value, _ in self._ranks[rank].window) * self._share[rank]

    def _name(self, rank: int) -> str:
        return f"rank {rank}" if self._hosts is None else f"rank {rank} ({self._hosts[rank]})"


def _others(values: dict[int, float]) -> dict[int, float]:
    """Median of the others' values for each rank of a group.

    In a large group, the median of all values, which is the same.
    """
    if len(values) > LARGE_GROUP:
        return dict.fromkeys(values, median(values.values()))
    return {
        rank: median(value for other, value in values.items() if other != rank) for rank in values
    }
