"""Measured beside planned: the terms of a run's step, the most wrong one first.

- A term's weight is what the planned step becomes when this term alone is as measured. So a stage
  that all others wait for counts, and a slow one that nobody waits for does not.
- The bubble is no cause: it follows from the others, and has no weight of its own.
- A term that the plan does not know is taken as measured, and says so.

Alternatives considered:
- The differences of the terms themselves: a slow stage would come second to the waiting it causes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from k2train.plan.action import Op
from k2train.planner.lanes import (
    BUBBLE,
    COMPUTE,
    DATA,
    HOST,
    LANE_TERMS,
    OPTIMIZER,
    PIPELINE,
    TENSOR,
    ActionTime,
    Kind,
    Measured,
    pipeline_seconds,
)
from k2train.planner.planned_step import Planned
from k2train.train.setup import Setup

OPERATIONS = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "input gradient",
    Op.BACKWARD_WEIGHT: "weight gradient",
}
NOTHING = 1e-9
"""Seconds that are only rounding."""


@dataclass(frozen=True)
class Row:
    """One term, seconds of a step."""

    term: str
    planned: float | None
    """None where the plan does not know the term."""
    measured: float
    moves: float | None
    """Seconds by which the planned step changes with this term alone as measured."""
    kind: Kind | None = None
    """Stage and operation of an action's term."""

    @property
    def ratio(self) -> float | None:
        """Measured over planned."""
        return self.measured / self.planned if self.planned else None


@dataclass(frozen=True)
class Comparison:
    """A run's step, planned and measured."""

    setup: Setup
    measured: Measured
    planned: Planned
    planned_seconds: float
    rows: tuple[Row, ...]
    """The most wrong first; what is no cause last."""
    planned_lanes: tuple[Mapping[str, float], ...]
    """Planned seconds of each pipeline rank by term, unknown ones as measured."""


@dataclass(frozen=True)
class _Model:
    """A step as a sum: the pipeline of some actions, and what comes before and behind it."""

    actions: Mapping[Kind, ActionTime]
    pipeline: float
    data: float
    optimizer: float
    host: float

    def seconds(self, setup: Setup) -> float:
        """Seconds of the step."""
        own = pipeline_seconds(setup.programs, self.actions)
        return own + self.pipeline + self.data + self.optimizer + self.host


def compare(setup: Setup, measured: Measured, planned: Planned) -> Comparison:
    """Compare the steps of a run with their plan."""
    inside = _inside(setup, measured)
    real = _Model(
        measured.actions,
        measured.mean(PIPELINE),
        measured.mean(DATA) - inside,
        measured.mean(OPTIMIZER),
        measured.mean(HOST),
    )
    plan = _Model(
        {
            kind: one if planned.tensor_known else replace(one, tensor=real.actions[kind].tensor)
            for kind, one in planned.actions.items()
        },
        _known(planned.pipeline, real.pipeline),
        _known(planned.data, real.data),
        _known(planned.optimizer, real.optimizer),
        _known(planned.host, real.host),
    )
    if planned.data is None:
        plan = replace(plan, actions=_with(plan, real, "data"))

    base = plan.seconds(setup)
    lanes = tuple(_planned_lane(setup, plan, pp) for pp in range(setup.layout.pipeline))
    rows = [_action_row(setup, plan, real, kind, base) for kind in plan.actions]

    def row(term: str, known: bool, changed: _Model | None) -> Row:
        mean = sum(lane[term] for lane in lanes) / len(lanes)
        moves = None if changed is None else changed.seconds(setup) - base
        return Row(term, mean if known else None, measured.mean(term), moves)

    tensor = replace(plan, actions=_with(plan, real, "tensor"))
    data = replace(plan, actions=_with(plan, real, "data"), data=real.data)
    rows += [
        row(TENSOR, planned.tensor_known, tensor),
        row(PIPELINE, planned.pipeline is not None, replace(plan, pipeline=real.pipeline)),
        row(DATA, planned.data is not None, data),
        row(OPTIMIZER, planned.optimizer is not None, replace(plan, optimizer=real.optimizer)),
        row(HOST, planned.host is not None, replace(plan, host=real.host)),
        row(BUBBLE, True, None),
    ]
    kept = [one for one in rows if max(one.measured, one.planned or 0.0) > NOTHING]
    kept.sort(key=lambda one: -1.0 if one.moves is None else abs(one.moves), reverse=True)
    return Comparison(setup, measured, planned, base, tuple(kept), lanes)


def _known(planned: float | None, measured: float) -> float:
    return measured if planned is None else planned


def _inside(setup: Setup, measured: Measured) -> float:
    """Data-parallel exchanges inside of actions, mean seconds of a pipeline rank's step."""
    whole = sum(one.data for one in measured.actions.values()) * setup.num_microbatches
    return whole / setup.layout.pipeline


def _with(plan: _Model, real: _Model, part: str) -> dict[Kind, ActionTime]:
    """Planned actions with one part of each as measured."""
    return {
        kind: replace(one, **{part: getattr(real.actions[kind], part)})
        for kind, one in plan.actions.items()
    }


def _action_row(setup: Setup, plan: _Model, real: _Model, kind: Kind, base: float) -> Row:
    own = replace(plan.actions[kind], compute=real.actions[kind].compute)
    moves = replace(plan, actions={**plan.actions, kind: own}).seconds(setup) - base
    count = setup.num_microbatches
    return Row(
        f"stage {kind[0]} {OPERATIONS[kind[1]]}",
        count * plan.actions[kind].compute,
        count * real.actions[kind].compute,
        moves,
        kind,
    )


def _planned_lane(setup: Setup, plan: _Model, pp: int) -> dict[str, float]:
    """Planned terms of one pipeline rank."""
    stages, count = setup.layout.stages_of(pp), setup.num_microbatches
    own = [one for (stage, _), one in plan.actions.items() if stage in stages]
    compute, tensor, inside = (
        count * sum(getattr(one, part) for one in own) for part in ("compute", "tensor", "data")
    )
    alone = setup.layout.pipeline == 1
    free = pipeline_seconds(setup.programs, plan.actions)
    found = {
        COMPUTE: compute,
        TENSOR: tensor,
        BUBBLE: 0.0 if alone else free - compute - tensor - inside,
        PIPELINE: plan.pipeline,
        DATA: plan.data + inside,
        OPTIMIZER: plan.optimizer,
        HOST: plan.host,
    }
    return {term: found[term] for term in LANE_TERMS}
