"""Schedule checking and transfer insertion: all pipeline ranks walked together in lockstep.

- Transfers are inserted during the walk, so every program is a view of one global order. Both ends
  of a pair see their transfers in the same order, and even fully blocking transfers cannot
  deadlock.
- A list that cannot run raises an error that names each rank's action and what it waits for.

Alternatives considered:
- Each rank derives its own sends and receives from its neighbour's role: right only until somebody
  adds a schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from k2train.plan.action import (
    Action,
    Op,
    Program,
    ScheduleError,
    counterpart,
    dependencies,
    result,
    transfer_after,
)
from k2train.plan.layout import Layout


def check(programs: Sequence[Sequence[Action]], layout: Layout, num_microbatches: int) -> None:
    """Raise ScheduleError for programs that are incomplete, out of order or stuck.

    Transfers are ignored.

    - Every (stage, micro-batch) has one forward and one backward on the stage's rank: a B, or an I
      and then a W.
    - Each stage runs its forwards in micro-batch order, its B's and I's together, and its B's and
      W's together (the additions to its weight gradients).
    - All ranks together reach their ends.
    """
    if len(programs) != layout.pipeline:
        raise ScheduleError(
            f"there are {len(programs)} programs for {layout.pipeline} pipeline ranks"
        )

    computes = [[action for action in program if action.op.is_compute] for program in programs]
    for pp, actions in enumerate(computes):
        for action in actions:
            if action.stage not in layout.stages_of(pp):
                raise ScheduleError(
                    f"rank {pp} runs {action}, but does not hold stage {action.stage}"
                )
        for stage in layout.stages_of(pp):
            _check_stage(
                pp, stage, [action for action in actions if action.stage == stage], num_microbatches
            )

    for _ in _lockstep(computes, layout.num_stages):
        pass


def _check_stage(pp: int, stage: int, actions: Sequence[Action], num_microbatches: int) -> None:
    """Check one stage: each micro-batch once and in order in every role, and W only with an I."""
    # Where any micro-batch has an I, the weight gradients are the B's and W's.
    split = {action.microbatch for action in actions if action.op is Op.BACKWARD_INPUT}
    roles = {"F": (Op.FORWARD,), "B": (Op.BACKWARD, Op.BACKWARD_INPUT)}
    if split:
        roles = {
            "F": (Op.FORWARD,),
            "I": (Op.BACKWARD, Op.BACKWARD_INPUT),
            "W": (Op.BACKWARD, Op.BACKWARD_WEIGHT),
        }

    for role, ops in roles.items():
        found = [action.microbatch for action in actions if action.op in ops]
        if found != list(range(num_microbatches)):
            raise ScheduleError(
                f"rank {pp} must run {stage}{role} of micro-batches 0 to {num_microbatches - 1} "
                f"once each and in order, not {found}"
            )

    for action in actions:
        if action.op is Op.BACKWARD_WEIGHT and action.microbatch not in split:
            raise ScheduleError(f"rank {pp} runs {action}, but no {stage}I{action.microbatch}")


def _lockstep(
    programs: Sequence[Sequence[Action]], num_stages: int
) -> Iterator[tuple[int, Action]]:
    """Yield (rank, compute action) in an order all ranks can run: per tick one per ready rank.

    Within a tick a producer precedes its consumer where possible (forwards from the first rank on,
    backwards from the last). So the consumer's receive precedes its next computation, and overlaps
    with it.
    """
    positions = [0] * len(programs)
    done: set[Action] = set()
    while any(
        position < len(program) for position, program in zip(positions, programs, strict=True)
    ):
        heads = [
            (rank, program[positions[rank]])
            for rank, program in enumerate(programs)
            if positions[rank] < len(program)
        ]
        ready = [
            (rank, head) for rank, head in heads if done.issuperset(dependencies(head, num_stages))
        ]

        if not ready:
            missing = {
                rank: next(need for need in dependencies(head, num_stages) if need not in done)
                for rank, head in heads
            }
            raise ScheduleError(
                f"the schedule is stuck after {len(done)} actions: "
                + "; ".join(
                    f"rank {rank} waits at {head} for {_made_by(missing[rank], programs)}"
                    for rank, head in heads
                )
            )

        ready.sort(key=lambda entry: (0, entry[0]) if entry[1].op is Op.FORWARD else (1, -entry[0]))
        for rank, head in ready:
            positions[rank] += 1
            yield rank, head

        # Results count from the next tick on: within one, nobody sees them.
        done.update(result(head) for _, head in ready)


def _made_by(need: Action, programs: Sequence[Sequence[Action]]) -> Action:
    """Return the action of `programs` whose result is `need`, else `need`."""
    return next(
        (action for program in programs for action in program if result(action) == need), need
    )


def insert_transfers(programs: Sequence[Sequence[Action]], layout: Layout) -> tuple[Program, ...]:
    """Insert transfers: each send right after its compute, each receive posted before its use.

    A receive is appended to its rank at the moment of the send, at that rank's current position. It
    cannot have used the tensor yet.
    """
    complete: list[list[Action]] = [[] for _ in programs]
    for rank, action in _lockstep(programs, layout.num_stages):
        complete[rank].append(action)
        transfer = transfer_after(action, layout.owner, layout.num_stages)
        if transfer:
            send, receiver, receive = transfer
            complete[rank].append(send)
            complete[receiver].append(receive)
    return tuple(tuple(program) for program in complete)


def check_transfers(programs: Sequence[Sequence[Action]], layout: Layout) -> None:
    """Raise ScheduleError for transfers that are missing, misplaced, or in different orders.

    - Every compute action has its inputs posted before it and its result sent after it.
    - Both ends of every pair of ranks see the same order. NCCL runs a pair's transfers in the order
      of issue, so a difference is a hang.
    - All ranks reach their ends even if every transfer blocks until both ends are there.
    """
    num_stages = layout.num_stages
    indices = [_indices(rank, program) for rank, program in enumerate(programs)]
    makers = [{result(action): action for action in program} for program in programs]
    expected: list[set[Action]] = [set() for _ in programs]

    def require_order(rank: int, first: Action, second: Action) -> None:
        index_of = indices[rank]
        if first not in index_of or second not in index_of or index_of[first] > index_of[second]:
            raise ScheduleError(f"rank {rank} must have {first} before {second}")

    for rank, program in enumerate(programs):
        for action in program:
            transfer = (
                transfer_after(action, layout.owner, num_stages) if action.op.is_compute else None
            )

            if transfer:
                send, receiver, receive = transfer
                expected[rank].add(send)
                expected[receiver].add(receive)
                require_order(rank, action, send)
                user = Action(result(action).op, receive.stage, receive.microbatch)
                require_order(receiver, receive, makers[receiver].get(user, user))

    for rank, program in enumerate(programs):
        for action in program:
            if not action.op.is_compute and action not in expected[rank]:
                raise ScheduleError(
                    f"rank {rank} has the transfer {action}, which no compute action needs"
                )

    _check_pair_orders(programs)
    _check_blocking(programs, num_stages)


def _indices(rank: int, program: Sequence[Action]) -> dict[Action, int]:
    """Index of each action in `program`, which must hold each once."""
    index_of = {action: index for index, action in enumerate(program)}
    if len(index_of) != len(program):
        twice = next(action for index, action in enumerate(program) if index_of[action] != index)
        raise ScheduleError(f"rank {rank} has {twice} more than once")
    return index_of


def _check_pair_orders(programs: Sequence[Sequence[Action]]) -> None:
    for low in range(len(programs)):
        for high in range(low + 1, len(programs)):
            ours = [action for action in programs[low] if action.peer == high]
            theirs = [counterpart(high, action) for action in programs[high] if action.peer == low]
            for index, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
                if mine != yours:
                    raise ScheduleError(
                        f"ranks {low} and {high} disagree on their transfer {index}: "
                        f"rank {low} has {mine}, rank {high} has {counterpart(low, yours)}"
                    )


def _check_blocking(programs: Sequence[Sequence[Action]], num_stages: int) -> None:
    """Walk all ranks with every transfer as a rendezvous of its two ends."""
    positions = [0] * len(programs)
    done: set[Action] = set()

    def head(rank: int) -> Action | None:
        return programs[rank][positions[rank]] if positions[rank] < len(programs[rank]) else None

    def advance(rank: int) -> bool:
        action = head(rank)
        if action is None:
            return False

        if action.op.is_compute:
            if not done.issuperset(dependencies(action, num_stages)):
                return False
            done.add(result(action))
        else:
            assert action.peer is not None, f"the transfer {action} has no peer"
            if head(action.peer) != counterpart(rank, action):
                return False
            # A rendezvous: both ends move on.
            positions[action.peer] += 1

        positions[rank] += 1
        return True

    while any(advance(rank) for rank in range(len(programs))):
        pass

    stuck = [(rank, head(rank)) for rank in range(len(programs)) if head(rank) is not None]
    if stuck:
        waits = "; ".join(f"rank {rank} waits at {action}" for rank, action in stuck)
        raise ScheduleError(f"the schedule is stuck after {sum(positions)} actions: {waits}")
