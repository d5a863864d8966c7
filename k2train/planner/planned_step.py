"""Planned step of a run's own config: seconds of each action and term, on a cluster or by shape.

- On a cluster every term is predicted (`plan.step_time`), with the schedule, layers and overlap of
  the config.
- Without one the plan knows the shape only: FLOPs of each stage, a backward as two forwards. One
  scale makes it seconds: the median of measured over planned. A single slow stage moves a median
  little, so it stays visible.

Alternatives considered:
- A scale for each operation: with two stages it would hide half of what a slow one takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from k2train.plan.action import Op
from k2train.plan.balance import layer_flops, stage_flops
from k2train.plan.efficiency import constants_of
from k2train.plan.hardware import Cluster
from k2train.plan.layer_time import Pass
from k2train.plan.measured_time import time_of
from k2train.plan.step_time import StagePasses, action_seconds, stage_passes, step_time
from k2train.plan.workload import Workload
from k2train.planner.lanes import Actions, ActionTime, Kind, Measured, pipeline_seconds
from k2train.planner.layouts import Question
from k2train.train.setup import Setup

TENSOR_TERM = "tensor traffic"
AFTER_PIPELINE = ("data traffic", "optimizer")


@dataclass(frozen=True)
class Planned:
    """Planned seconds; None for a term that the plan does not know."""

    actions: Actions
    transfer: float
    """Of one activation, from stage to stage."""
    tensor_known: bool = False
    pipeline: float | None = None
    """What transfers add to the pipeline."""
    data: float | None = None
    optimizer: float | None = None
    host: float | None = None


def kinds_of(setup: Setup) -> list[Kind]:
    """(stage, operation) of all compute actions of the schedule."""
    found = {(a.stage, a.op) for p in setup.programs for a in p if a.op.is_compute}
    return sorted(found)


def workload_of(setup: Setup, cluster: Cluster, device_type: str) -> Workload:
    """The step of a run on a cluster: what a search would ask, with the run's own schedule."""
    config, layout = setup.config, setup.layout
    question = Question(config, cluster, layout.world_size)
    return replace(
        question.space.workload(question.configured),
        stages_per_rank=layout.stages_per_rank,
        sequence_parallel=setup.sequence,
        schedule=config.parallel.schedule,
        layers_per_stage=layout.layers_per_stage,
        overlap_data=setup.overlap(device_type),
    )


def planned_on(setup: Setup, cluster: Cluster, device_type: str) -> Planned:
    """Plan of a run on a cluster, by every term. Raises ConfigError as `step_time`."""
    work = workload_of(setup, cluster, device_type)
    time = time_of(work, cluster, constants_of(cluster.device.generation))
    passes = stage_passes(work, time)
    actions = {kind: _action_time(passes, kind) for kind in kinds_of(setup)}
    transfer = action_seconds(work, time, passes)(0, Op.SEND_FORWARD)
    terms = step_time(work, cluster).terms
    compute = {*passes[0].forward.terms, *passes[0].backward.terms, "bubble", *AFTER_PIPELINE}
    free = pipeline_seconds(setup.programs, actions)
    return Planned(
        actions,
        transfer,
        tensor_known=True,
        pipeline=pipeline_seconds(setup.programs, actions, transfer) - free,
        data=terms["data traffic"],
        optimizer=terms["optimizer"],
        host=sum(seconds for name, seconds in terms.items() if name not in compute),
    )


def _action_time(passes: Sequence[StagePasses], kind: Kind) -> ActionTime:
    one = passes[kind[0]]
    found: Pass = {
        Op.FORWARD: one.forward,
        Op.BACKWARD: one.backward,
        Op.BACKWARD_INPUT: one.backward_input,
        Op.BACKWARD_WEIGHT: one.backward_weight,
    }[kind[1]]
    tensor = found.terms.get(TENSOR_TERM, 0.0)
    return ActionTime(found.seconds - tensor, tensor)


def relative_work(setup: Setup, kind: Kind) -> float:
    """FLOPs of an action, as multiples that only matter for each other."""
    stage, op = kind
    shape, layout, length = setup.architecture, setup.layout, setup.config.data.sequence_length
    forward = stage_flops(shape, layout, stage, length) / 3
    again = 0.0
    if setup.config.kernels.recompute == "full":
        again = len(layout.layers_of(stage, shape.num_layers)) * layer_flops(shape, length) / 3
    whole = {
        Op.FORWARD: forward,
        Op.BACKWARD: 2 * forward + again,
        Op.BACKWARD_INPUT: forward + again,
        Op.BACKWARD_WEIGHT: forward,
    }
    return whole[op]


def planned_shape(setup: Setup, measured: Measured) -> Planned:
    """The plan's shape, scaled to the measured actions; other terms are not planned."""
    work = {kind: relative_work(setup, kind) for kind in kinds_of(setup)}
    scale = median(measured.actions[kind].compute / work[kind] for kind in work)
    return Planned({kind: ActionTime(scale * work[kind]) for kind in work}, 0.0)
