"""Pipeline schedules as data: GPipe, 1F1B, interleaved and zero-bubble, as lists of actions.

- A program is a tuple of `Action`, one per pipeline rank. `build_programs` makes them.
- The executor runs a program, the simulator times it, the drawing shows it. No other code knows an
  order.
- Schedules differ only in the function that makes the list, and `pipeline=1` is a list like any
  other. Zero-bubble schedules, with a backward pass of two actions, are lists too (`zero_bubble`).
- Transfers are inserted afterwards (`lockstep`). A send follows its compute action directly. A
  receive is *posted*: the rank waits where it uses the tensor, not at the receive.
- In every schedule a stage runs its forwards in micro-batch order, its backwards too, and the
  additions to its weight gradients. Gradients are summed in that order, so equal bits across
  schedules depend on it. `check` refuses a list that breaks it.

Alternatives considered:
- A loop with warm-up, steady and cool-down parts per schedule: its order can only be seen by
  running it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from k2train.plan.action import Action, Op, Program, ScheduleError
from k2train.plan.layout import Layout, Placement
from k2train.plan.lockstep import check, check_transfers, insert_transfers
from k2train.plan.zero_bubble import zb_h1, zb_h2, zb_v

__all__ = [
    "SCHEDULES",
    "Action",
    "Op",
    "Program",
    "ScheduleError",
    "build_programs",
    "check",
    "check_transfers",
    "gpipe",
    "insert_transfers",
    "interleaved",
    "one_f_one_b",
    "pipeline_layout",
    "placement_of",
]


def build_programs(
    kind: str, pipeline: int, num_microbatches: int, stages_per_rank: int = 1
) -> tuple[tuple[Action, ...], ...]:
    """Build the checked programs, transfers included, of all `pipeline` ranks for one step.

    `kind` is a key of `SCHEDULES`. Raises ScheduleError when the schedule does not allow these
    numbers.
    """
    if kind not in SCHEDULES:
        raise ScheduleError(f"parallel.schedule ({kind}) must be one of: {', '.join(SCHEDULES)}")
    if min(pipeline, num_microbatches, stages_per_rank) < 1:
        raise ScheduleError(
            f"parallel.pipeline ({pipeline}), micro-batches ({num_microbatches}) and "
            f"parallel.stages_per_rank ({stages_per_rank}) must each be at least 1"
        )

    programs = SCHEDULES[kind](pipeline, num_microbatches, stages_per_rank)
    layout = pipeline_layout(kind, pipeline, stages_per_rank)
    check(programs, layout, num_microbatches)
    complete = insert_transfers(programs, layout)
    check_transfers(complete, layout)

    return complete


def placement_of(kind: str) -> Placement:
    """Placement of the stages over the ranks that a schedule needs."""
    return "v" if kind == "zb-v" else "loop"


def pipeline_layout(kind: str, pipeline: int, stages_per_rank: int = 1) -> Layout:
    """Layout of the pipeline axis alone: which rank holds which stage under a schedule."""
    return Layout(pipeline=pipeline, stages_per_rank=stages_per_rank, placement=placement_of(kind))


def gpipe(pipeline: int, num_microbatches: int, stages_per_rank: int = 1) -> tuple[Program, ...]:
    """GPipe: all forwards, then all backwards (Huang et al. 2019); compute only.

    Holds every micro-batch's activations.
    """
    _require_one_stage("gpipe", stages_per_rank)
    return tuple(
        tuple(
            Action(op, pp, microbatch)
            for op in (Op.FORWARD, Op.BACKWARD)
            for microbatch in range(num_microbatches)
        )
        for pp in range(pipeline)
    )


def one_f_one_b(
    pipeline: int, num_microbatches: int, stages_per_rank: int = 1
) -> tuple[Program, ...]:
    """1F1B: one forward, one backward (Narayanan et al. 2019, PipeDream-Flush); compute only.

    Rank `pp` holds the activations of at most `pipeline - pp` micro-batches.
    """
    _require_one_stage("1f1b", stages_per_rank)

    def program(pp: int) -> Program:
        forwards = [Action(Op.FORWARD, pp, microbatch) for microbatch in range(num_microbatches)]
        backwards = [Action(Op.BACKWARD, pp, microbatch) for microbatch in range(num_microbatches)]

        return _alternate(forwards, backwards, warmup=pipeline - pp - 1)

    return tuple(program(pp) for pp in range(pipeline))


def interleaved(pipeline: int, num_microbatches: int, stages_per_rank: int) -> tuple[Program, ...]:
    """Interleaved 1F1B, several stages per rank (Narayanan et al. 2021, section 2.2); compute only.

    A rank takes `pipeline` micro-batches through one of its stages, then the same ones through its
    next stage. The bubble shrinks by `stages_per_rank`, at that many times the transfers. Raises
    ScheduleError unless the number of micro-batches is a multiple of `pipeline`.
    """
    if stages_per_rank < 2:
        raise ScheduleError(
            "parallel.schedule (interleaved) needs parallel.stages_per_rank "
            f"({stages_per_rank}) of at least 2; with 1 take parallel.schedule=1f1b"
        )

    if num_microbatches % pipeline:
        below = num_microbatches - num_microbatches % pipeline
        nearest = ", ".join(str(count) for count in (below, below + pipeline) if count)
        raise ScheduleError(
            f"parallel.schedule (interleaved) needs a number of micro-batches ({num_microbatches}) "
            f"divisible by parallel.pipeline ({pipeline}); nearest that are: {nearest} "
            "(micro-batches = batch.global_sequences / data-parallel size / batch.micro_sequences)"
        )

    def action_target(pp: int, index: int, backward: bool) -> tuple[int, int]:
        # The same micro-batches pass all local stages before the next block of them begins.
        block, within = divmod(index, pipeline * stages_per_rank)
        turn, offset = divmod(within, pipeline)
        local_stage = stages_per_rank - 1 - turn if backward else turn
        return local_stage * pipeline + pp, block * pipeline + offset

    def program(pp: int) -> Program:
        count = num_microbatches * stages_per_rank
        forwards = [
            Action(Op.FORWARD, *action_target(pp, index, backward=False)) for index in range(count)
        ]
        backwards = [
            Action(Op.BACKWARD, *action_target(pp, index, backward=True)) for index in range(count)
        ]
        return _alternate(
            forwards, backwards, warmup=2 * (pipeline - pp - 1) + (stages_per_rank - 1) * pipeline
        )

    return tuple(program(pp) for pp in range(pipeline))


def _zb_h1(pipeline: int, num_microbatches: int, stages_per_rank: int = 1) -> tuple[Program, ...]:
    _require_one_stage("zb-h1", stages_per_rank)
    return zb_h1(pipeline, num_microbatches)


def _zb_h2(pipeline: int, num_microbatches: int, stages_per_rank: int = 1) -> tuple[Program, ...]:
    _require_one_stage("zb-h2", stages_per_rank)
    return zb_h2(pipeline, num_microbatches)


def _zb_v(pipeline: int, num_microbatches: int, stages_per_rank: int = 2) -> tuple[Program, ...]:
    if stages_per_rank != 2:
        raise ScheduleError(
            f"parallel.schedule (zb-v) needs parallel.stages_per_rank ({stages_per_rank}) to be 2"
        )
    return zb_v(pipeline, num_microbatches)


SCHEDULES: dict[str, Callable[[int, int, int], tuple[Program, ...]]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": _zb_h1,
    "zb-h2": _zb_h2,
    "zb-v": _zb_v,
}


def _require_one_stage(kind: str, stages_per_rank: int) -> None:
    if stages_per_rank != 1:
        others = "interleaved" if stages_per_rank != 2 else "interleaved or zb-v"
        raise ScheduleError(
            f"parallel.schedule ({kind}) needs parallel.stages_per_rank "
            f"({stages_per_rank}) to be 1; with more take parallel.schedule={others}"
        )


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> Program:
    """`warmup` forwards, then forward and backward in turn, then the remaining backwards."""
    warmup = min(warmup, len(forwards))
    actions = list(forwards[:warmup])
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        actions += [forward, backward]
    return tuple(actions) + tuple(backwards[len(forwards) - warmup :])
