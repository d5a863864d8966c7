"""Pipeline on shared cores: more processes than cores take turns, and an idle rank frees its own.

- Each pipeline rank stands for `width` processes that work alike. While `a` of them have an action,
  `a x width` processes share the cores, and each runs at `cores / (a x width)` of its speed, at
  most 1 (processor sharing, as the kernel's scheduler does it over milliseconds).
- Transfers run beside computation and take no core here.
- With enough cores the times are those of `program_graph`, which a test compares.

Alternatives considered:
- One factor for all ranks: it charges a rank for others that wait in the bubble.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from k2train.plan.action import Op
from k2train.plan.program_graph import ProgramGraph

LEAST_SECONDS = 1e-12
Durations = Callable[[int, Op], float]


def shared_seconds(graph: ProgramGraph, durations: Durations, width: int, cores: int) -> float:
    """Seconds from the first start to the last end, on so many cores.

    `durations` are those of a rank that has a core for each of its processes.
    """
    run = _Run(graph, durations)
    now = 0.0
    while not run.done:
        run.start_ready(now)
        share = run.share(width, cores)
        now = run.next_event(now, share)
        run.advance(now, share)
    return now


class _Run:
    """State of one simulation: what waits, what computes with how much left, what is on its way."""

    def __init__(self, graph: ProgramGraph, durations: Durations):
        self.seconds = [durations(stage, op) for stage, op in graph.kinds]
        self.computes = [op.is_compute for _, op in graph.kinds]
        self.nodes = graph.nodes
        self.missing = [len(set(needs)) for _, needs in graph.nodes]
        self.users = _users_of([needs for _, needs in graph.nodes])
        self.ready = [index for index, count in enumerate(self.missing) if not count]
        self.working: dict[int, float] = {}
        self.sending: list[tuple[float, int]] = []
        self.left = len(graph.nodes)
        self.last = 0.0

    @property
    def done(self) -> bool:
        """Whether every action has ended."""
        return self.left == 0

    def start_ready(self, now: float) -> None:
        """Start what waits for nothing any more."""
        for index in self.ready:
            kind = self.nodes[index][0]
            if self.computes[kind]:
                self.working[index] = self.seconds[kind]
            else:
                heapq.heappush(self.sending, (now + self.seconds[kind], index))
        self.ready = []
        self.last = now

    def share(self, width: int, cores: int) -> float:
        """Speed of each process now, 1 with a core of its own."""
        return min(1.0, cores / (len(self.working) * width)) if self.working else 1.0

    def next_event(self, now: float, share: float) -> float:
        """When the next action ends."""
        ends = [now + min(self.working.values()) / share] if self.working else []
        if self.sending:
            ends.append(self.sending[0][0])
        assert ends, "an action waits for one that never runs"
        return min(ends)

    def advance(self, now: float, share: float) -> None:
        """Take off what was done since the last event, and end what is complete."""
        done, ended = (now - self.last) * share, []
        # Rounding leaves a sliver of what has ended. After hours it is less than time can show, so
        # that waiting for it would never end.
        sliver = LEAST_SECONDS + 4 * math.ulp(now)
        for index in list(self.working):
            self.working[index] -= done
            if self.working[index] <= sliver:
                del self.working[index]
                ended.append(index)
        while self.sending and self.sending[0][0] <= now:
            ended.append(heapq.heappop(self.sending)[1])

        for index in ended:
            self.left -= 1
            for user in self.users[index]:
                self.missing[user] -= 1
                if not self.missing[user]:
                    self.ready.append(user)


def _users_of(needs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of each action, those that wait for it."""
    users: list[list[int]] = [[] for _ in needs]
    for index, before in enumerate(needs):
        for one in set(before):
            users[one].append(index)
    return users
