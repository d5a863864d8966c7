"""Step time of a workload on a cluster, by term, with an interval from named uncertainties.

- The pipeline is no formula: the action lists that the executor runs are timed, with the
  seconds of each stage's passes. So uneven stages, the head and transfers count where they are.
- A step with many micro-batches repeats itself between its ends. Only so many are simulated that it
  does, and the others are added at the pace that the simulation shows.
- After the pipeline: what is left of the gradients' traffic, the optimizer, the weights' gather.

Alternatives considered:
- Simulating every micro-batch: the same times, and a search would take minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from k2train.plan.action import Op
from k2train.plan.efficiency import Constants, constants_of
from k2train.plan.greedy_schedule import StageSeconds, greedy_seconds
from k2train.plan.hardware import Cluster
from k2train.plan.layer_time import LayerTime, Pass
from k2train.plan.measured_time import MeasuredTime, time_of
from k2train.plan.program_graph import program_graph, table
from k2train.plan.shared_cores import shared_seconds
from k2train.plan.workload import Workload

SEARCHED = {"zb-1p": 1, "zb-2p": 2}
"""Schedules that a search orders, and micro-batches held for each pipeline rank."""
KEPT_FOR_WEIGHTS = 0.4
"""Share of a layer's activations that its weight gradients need: products' inputs and outputs."""
STEADY_ROUNDS = 3
"""Micro-batches for each pipeline rank after which a schedule repeats itself."""


@dataclass(frozen=True)
class StepTime:
    """Predicted step: seconds by term, and the bubble."""

    seconds: float
    terms: Mapping[str, float]
    """Seconds of the busiest pipeline rank by term; they sum to `seconds`."""
    bubble: float
    """Share of the pipeline's time that ranks do not compute."""


def step_time(work: Workload, cluster: Cluster, constants: Constants | None = None) -> StepTime:
    """Predict one optimizer step. Raises ConfigError for a group that no link joins."""
    constants = constants or constants_of(cluster.device.generation)
    time = time_of(work, cluster, constants)
    passes = stage_passes(work, time)
    pipeline = pipeline_seconds(work, time, passes)

    busy = [_busy(work, passes, pp) for pp in range(work.pipeline)]
    busiest = max(range(work.pipeline), key=lambda pp: busy[pp].seconds)
    terms = {**busy[busiest].terms, "bubble": pipeline - busy[busiest].seconds}

    terms |= _after_pipeline(work, time, busiest, passes)
    measured = time.speed if isinstance(time, MeasuredTime) else None
    terms["step overhead"] = measured.step_seconds if measured else constants.step_seconds
    average = sum(each.seconds for each in busy) / work.pipeline
    # A rounding below zero would be shown as a negative share.
    return StepTime(sum(terms.values()), terms, max(0.0, 1 - average / pipeline))


@dataclass(frozen=True)
class StagePasses:
    """Passes of one stage and micro-batch."""

    forward: Pass
    backward: Pass
    backward_input: Pass
    backward_weight: Pass


def stage_passes(work: Workload, time: LayerTime) -> tuple[StagePasses, ...]:
    """Passes of each stage, first to last."""
    forward, whole, weight = time.forward(), time.backward(), time.weight_backward()
    negative = weight.times(-1.0)
    head_forward, head_backward = time.head()
    embedding = time.embedding()

    found = []
    for stage in range(work.layout.num_stages):
        layers = len(work.layout.layers_of(stage, work.shape.num_layers))
        own = [forward.times(layers), whole.times(layers), weight.times(layers)]
        split = (whole + negative).times(layers)
        if stage == 0:
            own[0], own[1], split = own[0] + embedding, own[1] + embedding, split + embedding
        if stage == work.layout.num_stages - 1:
            own[0], own[1] = own[0] + head_forward, own[1] + head_backward
            split = split + head_backward
        found.append(StagePasses(own[0], own[1], split, own[2]))
    return tuple(found)


def _busy(work: Workload, passes: Sequence[StagePasses], pp: int) -> Pass:
    """Compute of one pipeline rank in a step."""
    stages = work.layout.stages_of(pp)
    each = [one for stage in stages for one in (passes[stage].forward, passes[stage].backward)]
    return reduce(add, each).times(work.num_microbatches)


def pipeline_seconds(work: Workload, time: LayerTime, passes: Sequence[StagePasses]) -> float:
    """Seconds from the first forward to the last backward."""
    layout, count, kind = work.layout, work.num_microbatches, work.kind
    crowded = isinstance(time, MeasuredTime) and time.turns > 1
    if layout.num_stages == 1 and kind in ("1f1b", "gpipe"):
        turns = time.turns if isinstance(time, MeasuredTime) else 1.0
        return turns * count * (passes[0].forward.seconds + passes[0].backward.seconds)

    durations = action_seconds(work, time, passes)

    def run(microbatches: int) -> float:
        if work.schedule in SEARCHED:
            return searched_seconds(work, passes, durations, microbatches)
        graph = program_graph(kind, layout.pipeline, microbatches, layout.stages_per_rank)
        if crowded:
            assert time.cluster.measured and time.cluster.measured.cores, "cores are counted"
            width = work.world_size // work.pipeline
            return shared_seconds(graph, durations, width, time.cluster.measured.cores)
        return graph.seconds(durations, work.without_barrier)

    # Interleaved schedules take whole rounds; a part of one is charged at the pace of the others.
    p = layout.pipeline
    simulated = STEADY_ROUNDS * p
    whole = kind != "interleaved" or count % p == 0
    if kind == "gpipe" or (count <= simulated and whole):
        return run(count)
    simulated = max(p, min(simulated, count - count % p))
    total = run(simulated)
    pace = (total - run(simulated - p)) / p if simulated > p else total / (2 * p)
    # Held micro-batches let the others run ahead for a while; in the end the busiest decides.
    if not isinstance(time, MeasuredTime):
        pace = max(pace, max(_busy(work, passes, pp).seconds for pp in range(p)) / count)
    return total + (count - simulated) * pace


def searched_seconds(
    work: Workload,
    passes: Sequence[StagePasses],
    durations: Callable[[int, Op], float],
    microbatches: int,
) -> float:
    """Seconds of a schedule that its program searches for, with its limit of held micro-batches."""
    stages = tuple(
        StageSeconds(one.forward.seconds, one.backward_input.seconds, one.backward_weight.seconds)
        for one in passes
    )
    limit = SEARCHED[work.schedule] * work.pipeline
    transfer = durations(0, Op.SEND_FORWARD)
    return greedy_seconds(stages, transfer, microbatches, limit, KEPT_FOR_WEIGHTS)


def action_seconds(
    work: Workload, time: LayerTime, passes: Sequence[StagePasses]
) -> Callable[[int, Op], float]:
    """Seconds of each action by stage and operation; a transfer's for all others."""
    size = 2 * work.local_tokens * work.shape.hidden_size
    if not work.sequence_parallel:
        # Each rank sends its part, and the receivers gather it (Narayanan et al. 2021, 4.1).
        size /= work.tensor
    stride = work.world_size // work.pipeline
    if isinstance(time, MeasuredTime):
        transfer = time.transfer_seconds()
    else:
        transfer = time.cluster.send_seconds(size, stride, time.links) if work.pipeline > 1 else 0.0
    return table(
        [
            {
                Op.FORWARD: one.forward.seconds,
                Op.BACKWARD: one.backward.seconds,
                Op.BACKWARD_INPUT: one.backward_input.seconds,
                Op.BACKWARD_WEIGHT: one.backward_weight.seconds,
            }
            for one in passes
        ],
        transfer,
    )


def _after_pipeline(
    work: Workload, time: LayerTime, pp: int, passes: Sequence[StagePasses]
) -> dict[str, float]:
    """Terms behind the last backward of pipeline rank `pp`, seconds."""
    # The last micro-batch's backward, and the next step's first forward, run beside them.
    backward = sum(passes[stage].backward.seconds for stage in work.layout.stages_of(pp))
    forward = sum(passes[stage].forward.seconds for stage in work.layout.stages_of(pp))
    if isinstance(time, MeasuredTime):
        return time.after_pipeline(pp, backward, forward)

    cluster, count = time.cluster, work.rank_parameters(pp)
    ranks, stride = work.data * work.context, work.tensor
    share = count / ranks if work.zero else count

    gradients = weights = 0.0
    if work.zero == 0:
        gradients = cluster.all_reduce_seconds(
            work.gradient_bytes * count, ranks, stride, time.links
        )
    elif work.zero < 3:
        gradients = cluster.gather_seconds(work.gradient_bytes * count, ranks, stride, time.links)
        weights = cluster.gather_seconds(2 * count, ranks, stride, time.links)
    exposed = time.hidden_behind(gradients, backward, work.overlap_data)
    exposed += time.hidden_behind(weights, forward, work.overlap_data)

    tied = 0.0
    if work.tied and work.pipeline > 1:
        table = 4 * work.shape.vocab_size * work.shape.hidden_size / work.tensor
        across = work.world_size - work.world_size // work.pipeline
        tied = 2 * cluster.send_seconds(table, across, time.links)

    # Adam reads gradient, weights and two moments and writes three, all fp32, and the bf16 weights.
    # Besides, sums are cleared, and read for their norm and their scale.
    optimizer = time.moved(30 * share + 12 * (share if work.zero == 3 else count))
    return {"data traffic": exposed + tied, "optimizer": optimizer}
