"""A rank that is slow by itself, named while the run goes on: its own seconds of a step against those of its peers.

Own seconds are those of a step without the ones blocked in exchanges, where every rank shows the slowness of one. They are
the host's: on CUDA, where kernels and collectives are only enqueued and the host waits at one place for all of it, a device
that is slow by itself shows in every rank's time alike, and what is found is a slow host (data, Python, a busy core). Ranks of
one pipeline stage do the same work, so they are compared as they are; a stage with one rank is compared with the others by
its expected share, with more room, since a share is an estimate. A rank is slow when nearly all of its last steps are: the
second shortest of twenty lies well above the third part of
theirs that was shortest. Noise of a busy machine only ever adds to some steps, so it moves
means and even medians, but seldom that. Two rules: well above the others, or clearly above what this rank itself
used to take next to them (which leaves alone a rank that always has a bit more to do). Refused: a mean and a standard
deviation (one pause of a second hides everything), and the wall time of a step (equal on all ranks).

Every rank feeds the same numbers and gets the same answer. Told once when it begins and once when it ends.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

from k2train.plan.layout import Layout

WINDOW = 20
OWN_ORDER = 1
"""Index of the order statistic: so many of the window may be as quick as ever."""
PEER_ORDER = 8
"""The same of the others: what they take when the machine lets them, not their median, which noise of all ranks moves."""
SAME_STAGE = 1.25
OTHER_STAGE = 1.75
OWN_PAST = 1.2
PAST_STEPS = 256
ENOUGH_PAST = 64
LARGE_GROUP = 16
MIN_EXCESS_SECONDS = 0.005
"""Less than this is nobody's concern."""


class _Rank:
    def __init__(self) -> None:
        self.window: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """(seconds, the same over the others' median of that step), seconds of a whole share."""
        self.past: deque[float] = deque(maxlen=PAST_STEPS)
        self.since: int | None = None
        self.usual: float | None = None
        """What ratio was usual when it became slow by the second rule."""

    def order_statistic(self, index: int) -> float:
        """The seconds that all but `index` steps of a full window exceed."""
        ordered = sorted(value for value, _ in self.window)
        return ordered[min(index, len(ordered) - 1)]


class Stragglers:
    """BatchSource every step's own seconds of all ranks; answers with a line when a rank becomes slow, or is no longer.

    `weights`: of each rank the part of the work expected of it, in any unit (None: all alike); `hosts`: for the line.
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
        alone = any(len(ranks) == 1 for ranks in stages.values())
        self._groups = [list(range(world))] if alone else list(stages.values())
        self._factor = OTHER_STAGE if alone and len(stages) > 1 else SAME_STAGE
        self._ranks = [_Rank() for _ in range(world)]

    def observe(self, step: int, seconds: Sequence[float]) -> str | None:
        """Own seconds of each rank in `step`; a line for people, or None as nearly always."""
        assert len(seconds) == len(self._ranks), (
            f"{len(seconds)} times for {len(self._ranks)} ranks"
        )
        messages = []
        for group in self._groups:
            if len(group) < 2:
                continue
            self._record_step(group, seconds)
            # Of everything up to here: a group has one usual time, a rank is measured against it.
            others = _others(
                {rank: self._ranks[rank].order_statistic(PEER_ORDER) for rank in group}
            )
            for rank in group:
                message = self._evaluate(rank, step, others[rank])
                if message:
                    messages.append(message)
        return "; ".join(messages) or None

    def _record_step(self, group: Sequence[int], seconds: Sequence[float]) -> None:
        now = {rank: seconds[rank] / self._share[rank] for rank in group}
        others = _others(now)
        for rank in group:
            state = self._ranks[rank]
            if len(state.window) == WINDOW and state.since is None:
                state.past.append(state.window[0][1])
            state.window.append((now[rank], now[rank] / max(others[rank], 1e-6)))

    def _evaluate(self, rank: int, step: int, others: float) -> str:
        state = self._ranks[rank]
        if len(state.window) < WINDOW:
            return ""
        low = state.order_statistic(OWN_ORDER)
        ratio = sorted(value for _, value in state.window)[OWN_ORDER]
        if state.since is None:
            usual = median(state.past) if len(state.past) >= ENOUGH_PAST else None
            own = usual is not None and ratio > OWN_PAST * usual and low > OWN_PAST * usual * others
            if not (low > self._factor * others or own) or low - others < MIN_EXCESS_SECONDS:
                return ""
            state.since, state.usual = step, usual
            return (
                f"{self._name(rank)} is slow: {self._own_seconds(rank) * 1e3:.0f} ms of own work "
                "per step, the others take "
                f"{others * self._share[rank] * 1e3:.0f} ms (last {WINDOW} steps)"
            )
        # Over when most steps are well below what made it slow: at the threshold itself it would come and go.
        level = median(value for value, _ in state.window)
        usual_level = others * max(1.0, state.usual or 1.0)
        if level < max(usual_level * (1 + OWN_PAST) / 2, others + MIN_EXCESS_SECONDS / 2):
            since, state.since = state.since, None
            return f"{self._name(rank)} is no longer slow, after {step - since} steps"
        return ""

    def _own_seconds(self, rank: int) -> float:
        return median(value for value, _ in self._ranks[rank].window) * self._share[rank]

    def _name(self, rank: int) -> str:
        return f"rank {rank}" if self._hosts is None else f"rank {rank} ({self._hosts[rank]})"


def _others(values: dict[int, float]) -> dict[int, float]:
    """For each rank of a group the median of the others' values; in a large group that of all, which is the same."""
    if len(values) > LARGE_GROUP:
        return dict.fromkeys(values, median(values.values()))
    return {
        rank: median(value for other, value in values.items() if other != rank) for rank in values
    }
