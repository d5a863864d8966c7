"""Pipeline simulator: when each action runs, the bubble, the activations in flight.

- Input: programs and durations. Programs are walked as data: an action starts when its rank is free
  and its inputs are there. That gives the published bubble formulas exactly, and stays true for
  measured or uneven durations.
- Transfers run beside computation. One starts when it has been sent, its receive is posted and its
  link is free. A link is one direction between two pipeline ranks and carries one transfer at a
  time.
- A `Span` may also hold measured times: `bubble_fraction` and `draw` treat both alike.

Alternatives considered:
- A formula for each schedule: a new schedule would silently have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k2train.plan.action import Action, Op, ScheduleError, counterpart, dependencies, result


@dataclass(frozen=True)
class Span:
    """One action of one pipeline rank and when it ran. A receive's span is that of its transfer."""

    rank: int
    action: Action
    start_seconds: float
    end_seconds: float


def constant_seconds(
    forward: float = 1.0,
    backward: float = 2.0,
    transfer: float = 0.0,
    backward_input: float = 1.0,
    backward_weight: float = 1.0,
) -> Callable[[Action], float]:
    """Duration of each kind of action, for `simulate`.

    The defaults count in forwards of one stage.
    """
    durations = {
        Op.FORWARD: forward,
        Op.BACKWARD: backward,
        Op.BACKWARD_INPUT: backward_input,
        Op.BACKWARD_WEIGHT: backward_weight,
    }
    return lambda action: durations.get(action.op, transfer)


def simulate(
    programs: Sequence[Sequence[Action]], seconds: Callable[[Action], float] | None = None
) -> tuple[Span, ...]:
    """Return the span of every action, by rank and then in program order.

    - `programs` are complete, or compute only (transfers then take no time).
    - `seconds` returns the duration of an action; for a transfer it is asked of the sending end.
      None means `constant_seconds()`.

    Raises ScheduleError for programs that cannot reach their ends.
    """
    simulation = _Simulation(programs, seconds or constant_seconds())
    while any(simulation.advance(rank) for rank in range(len(programs))):
        pass

    waiting = [
        (rank, simulation.head(rank))
        for rank in range(len(programs))
        if simulation.head(rank) is not None
    ]

    if waiting:
        raise ScheduleError(
            "the simulated schedule is stuck: "
            + "; ".join(f"rank {rank} waits at {head}" for rank, head in waiting)
        )

    return tuple(
        Span(rank, action, *simulation.times[rank, action])
        for rank, program in enumerate(programs)
        for action in program
    )


class _Simulation:
    """State of one simulation: the position and clock of each rank, and the times known so far."""

    def __init__(
        self, programs: Sequence[Sequence[Action]], seconds: Callable[[Action], float]
    ) -> None:
        self.programs = programs
        self.seconds = seconds
        self.with_transfers = any(
            not action.op.is_compute for program in programs for action in program
        )
        self.num_stages = 1 + max(
            (action.stage for program in programs for action in program), default=0
        )

        self.positions = [0] * len(programs)
        self.clocks = [0.0] * len(programs)
        self.finished: dict[Action, tuple[int, float]] = {}
        self.issued: dict[tuple[int, Action], float] = {}
        self.links: dict[tuple[int, int], float] = {}
        self.times: dict[tuple[int, Action], tuple[float, float]] = {}

    def head(self, rank: int) -> Action | None:
        """Return the next action of `rank`, or None at its end."""
        program, position = self.programs[rank], self.positions[rank]
        return program[position] if position < len(program) else None

    def advance(self, rank: int) -> bool:
        """Take the next action of `rank` if its inputs have a known time."""
        action = self.head(rank)
        if action is None:
            return False

        if not action.op.is_compute:
            self._issue(rank, action)
        else:
            inputs = [self._available(rank, need) for need in dependencies(action, self.num_stages)]
            known = [moment for moment in inputs if moment is not None]
            if len(known) < len(inputs):
                return False
            # An action starts when its rank is free and its last input has arrived.
            start = max(self.clocks[rank], *known) if known else self.clocks[rank]
            self.clocks[rank] = start + self.seconds(action)
            self.times[rank, action] = (start, self.clocks[rank])
            self.finished[result(action)] = (rank, self.clocks[rank])

        self.positions[rank] += 1
        return True

    def _available(self, rank: int, need: Action) -> float | None:
        """Return when the result of the compute action `need` is on `rank`; None while unknown."""
        if need not in self.finished:
            return None
        producer, moment = self.finished[need]
        if producer == rank or not self.with_transfers:
            return moment
        op = Op.SEND_FORWARD if need.op is Op.FORWARD else Op.SEND_BACKWARD
        window = self.times.get((producer, Action(op, need.stage, need.microbatch, rank)))
        return window[1] if window else None

    def _issue(self, rank: int, action: Action) -> None:
        """Send or post at the rank's clock. The transfer runs once both ends are known."""
        self.issued[rank, action] = self.clocks[rank]
        assert action.peer is not None, f"the transfer {action} has no peer"
        other = (action.peer, counterpart(rank, action))
        if other not in self.issued:
            return

        send = (rank, action) if action.op.is_send else other
        link = (rank, action.peer) if action.op.is_send else (action.peer, rank)
        start = max(self.issued[rank, action], self.issued[other], self.links.get(link, 0.0))
        end = start + self.seconds(send[1])
        # The next transfer of this direction waits for this one.
        self.links[link] = end
        self.times[rank, action] = self.times[other] = (start, end)


def bubble_fraction(spans: Sequence[Span]) -> float:
    """Return the bubble: the fraction (0 to 1) of all ranks' time without computation.

    Time counts from the first start to the last end.

    Uniform 1F1B and GPipe give (p-1)/(m+p-1), interleaved with v stages per rank (p-1)/(v*m+p-1)
    (Narayanan et al. 2021, section 2.2, there divided by the ideal time, not the total).
    """
    computes = [span for span in spans if span.action.op.is_compute]
    if not computes:
        return 0.0
    total = max(span.end_seconds for span in computes) - min(
        span.start_seconds for span in computes
    )
    busy = sum(span.end_seconds - span.start_seconds for span in computes)
    num_ranks = len({span.rank for span in computes})
    return 1.0 - busy / (num_ranks * total) if total > 0 else 0.0


def idle_seconds(spans: Sequence[Span]) -> tuple[float, ...]:
    """Return each rank's time without computation between its own first start and last end.

    `bubble_fraction` also counts the wait for ranks that start earlier or end later.
    """
    by_rank: dict[int, list[Span]] = {}
    for span in spans:
        if span.action.op.is_compute:
            by_rank.setdefault(span.rank, []).append(span)
    return tuple(
        max(span.end_seconds for span in own)
        - min(span.start_seconds for span in own)
        - sum(span.end_seconds - span.start_seconds for span in own)
        for _, own in sorted(by_rank.items())
    )


def peak_in_flight(
    programs: Sequence[Sequence[Action]], until_input: bool = False
) -> tuple[int, ...]:
    """Return, for each rank, the most (stage, micro-batch) pairs that hold activations at once.

    - A pair holds everything its forward kept until its B or I. Between I and W it holds the
      factors of the weight gradients: the input of every matrix, and the gradient of its output in
      place of what only I needed.
    - So a pair counts from F to B or W. With `until_input` it counts from F to B or I, which
      separates the two.
    - Counted in activations of one stage: with v stages per rank, each is 1/v of the rank's layers.
    """
    change = {
        Op.FORWARD: 1,
        Op.BACKWARD: -1,
        Op.BACKWARD_INPUT if until_input else Op.BACKWARD_WEIGHT: -1,
    }
    peaks = []

    for program in programs:
        held = peak = 0
        for action in program:
            held += change.get(action.op, 0)
            peak = max(peak, held)
        peaks.append(peak)

    return tuple(peaks)
