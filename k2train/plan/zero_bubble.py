"""Zero-bubble schedules: the backward pass split in two, so that weight gradients fill idle time.

- Only the input gradient (I) has a dependent. Alone it travels back through the pipeline in half
  the time, and the weight gradients (W) fill the gaps of each rank (Qi et al. 2023,
  arXiv:2401.10241).
- The lists are written by hand, as the papers draw them.

F, I, W are the durations of the three actions of one stage. For m micro-batches on p ranks, m >=
2p-1:

    zb-h1   as many activations as 1F1B; each rank idles (p-1)(F+I-W) per step, 1F1B (p-1)(F+I+W)
    zb-h2   up to 2p-1 micro-batches' activations; with F = I = W no rank idles between its first
            action and its last
    zb-v    two half-size stages per rank in a V, activations as 1F1B; with F = I = W no rank idles

- "Activations" are held until W: at most p micro-batches on every rank, where 1F1B has p on the
  first and 1 on the last. What a rank holds before its I's is less: p-pp (zb-h1), 2(p-pp)-1
  (zb-h2).
- Ranks start one after the other, and so end one after the other. A step that ends together, as
  with a global gradient norm, still pays for the start: (p-1)F per rank, half of that with
  half-size stages (zb-v).

Alternatives considered:
- A greedy search over durations. Tried: the same or worse for equal durations, and behind 1F1B for
  unequal ones, because a W in a short gap delays the next I.
"""

from __future__ import annotations

from collections import Counter

from k2train.plan.action import Action, Op, Program

F, I, W = Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741


class _ProgramBuilder:
    """A program under construction. Numbers the micro-batches of each (op, stage) in order."""

    def __init__(self, num_microbatches: int):
        self.actions: list[Action] = []
        self.count: Counter[tuple[Op, int]] = Counter()
        self.num_microbatches = num_microbatches

    def add(self, op: Op, stage: int) -> None:
        """Add the next micro-batch of an op and a stage, if any is left."""
        microbatch = self.count[op, stage]
        self.count[op, stage] += 1
        if microbatch < self.num_microbatches:
            self.actions.append(Action(op, stage, microbatch))

    def finish(self, op: Op, stage: int) -> None:
        """Add all remaining micro-batches."""
        while self.count[op, stage] < self.num_microbatches:
            self.add(op, stage)


def zb_h1(pipeline: int, num_microbatches: int) -> tuple[Program, ...]:
    """ZB-H1: 1F1B with weight gradients delayed by `pp` micro-batches; compute only."""
    return tuple(
        _straight(pp, num_microbatches, warmup=pipeline - pp, lag=pp) for pp in range(pipeline)
    )


def zb_h2(pipeline: int, num_microbatches: int) -> tuple[Program, ...]:
    """ZB-H2: more forwards ahead, so no rank waits for the first input gradient; compute only.

    With fewer micro-batches than the first rank would run ahead it equals `zb_h1`, which is then
    shorter.
    """
    if num_microbatches < 2 * pipeline - 1:
        return zb_h1(pipeline, num_microbatches)
    return tuple(
        _straight(pp, num_microbatches, warmup=2 * (pipeline - pp) - 1, lag=2 * pp)
        for pp in range(pipeline)
    )


def _straight(pp: int, num_microbatches: int, warmup: int, lag: int) -> Program:
    """`warmup` forwards; then I, the W of `lag` micro-batches before, and F; the remaining W's."""
    program = _ProgramBuilder(num_microbatches)
    for _ in range(warmup):
        program.add(F, pp)
    for microbatch in range(num_microbatches):
        program.add(I, pp)
        if microbatch >= lag:
            program.add(W, pp)
        program.add(F, pp)
    program.finish(W, pp)
    return tuple(program.actions)


def zb_v(pipeline: int, num_microbatches: int) -> tuple[Program, ...]:
    """ZB-V: down the ranks and back up; compute only.

    Rank r has stages r and 2p-1-r. The last stage is on the first rank, and the turn is within the
    last rank. In the steady part each rank alternates F I W of its lower stage with F I W of its
    upper one. Fewer than 2p-1 micro-batches use the same list without the missing ones.
    """
    return tuple(_v_shape(pp, pipeline, num_microbatches) for pp in range(pipeline))


def _v_shape(pp: int, pipeline: int, num_microbatches: int) -> Program:
    lower, upper, above = pp, 2 * pipeline - 1 - pp, pipeline - pp
    rounds = max(num_microbatches, 2 * pipeline - 1)
    program = _ProgramBuilder(num_microbatches)

    def run(*actions: tuple[Op, int]) -> None:
        for op, stage in actions:
            program.add(op, stage)

    # Warm-up: fill the lower stage, then run both stages until the first backward arrives.
    for _ in range(2 * above - 1):
        run((F, lower))

    for _ in range(pp):
        run((F, upper), (F, lower))

    for _ in range(above):
        run((F, upper), (I, upper), (W, upper))

    # Steady: nothing idles when F = I = W.
    for _ in range(rounds - pipeline):
        run((F, lower), (I, lower), (W, lower), (F, upper), (I, upper), (W, upper))

    for _ in range(pp):
        run((I, lower), (I, upper))

    for _ in range(above):
        run((I, lower), (W, lower))

    program.finish(W, upper)
    program.finish(W, lower)
    return tuple(program.actions)
