"""Pipeline cut and schedule chosen by simulation: what `auto` means, from FLOPs alone.

- A cut is a number of layers for each stage. The balanced one gives the rank with the head fewer
  layers (`plan.balance`).
- Durations are FLOPs: a layer's forward, its gradient of the input and those of the weights, and
  the head. Transfers take no time, because no device is known.
- Something else than 1F1B with even stages must save `PAYS` of a step. A smaller gain is below what
  FLOPs can tell of a machine.
- A schedule may need `MEMORY` times the bytes of 1F1B, on the rank that needs most.
- Below `SMALLEST_LAYER` FLOPs of a layer the host's work between operators takes much of the time:
  even stages and 1F1B stay.
- The same numbers on every rank, so all choose alike.

Alternatives considered:
- Measured durations: a run would take another cut on another day, and ranks would have to agree.
- The rank's memory as the limit: it is known after torch has found the devices, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from k2train.plan.action import Op
from k2train.plan.balance import (
    balanced_layers,
    head_flops,
    layer_flops,
    nearly_even_layers,
    rank_flops,
    with_layers,
)
from k2train.plan.cost import ModelShape, layer_matrix_parameters
from k2train.plan.layout import Layout
from k2train.plan.program_graph import program_graph, table
from k2train.plan.schedule import pipeline_layout

AUTO = "auto"
PAYS = 0.03
"""Smallest share of a step that a choice must save."""
MEMORY = 1.05
"""Most bytes of a schedule, relative to 1F1B."""
SMALLEST_LAYER = 0.1e9
"""FLOPs of a micro-batch in one layer on one rank, forward and backward, below which they do not
tell its time. Measured on CPUs: at 0.04e9 half of the time is the host's (`docs/planning.md`).
"""
SIMULATED_ROUNDS = 8
"""Micro-batches for each pipeline rank that are simulated; the others cost the slowest rank's work.
"""

Cut = tuple[int, ...] | None
"""Layers of each stage; None: as many on every one."""


@dataclass(frozen=True)
class PipelineChoice:
    """A schedule, its stages on each rank, and its cut."""

    schedule: str
    stages_per_rank: int
    layers_per_stage: Cut


@dataclass(frozen=True)
class PipelineWork:
    """What is to be divided: a model, the length of its samples, and the micro-batches of a step.

    `fused_loss`: the forward of the last stage computes the head's gradients, too.
    `microbatch_tokens`: tokens of a micro-batch, divided by tensor-parallel ranks; None: so many
    that FLOPs tell its time.
    """

    shape: ModelShape
    sequence_length: int
    pipeline: int
    num_microbatches: int
    fused_loss: bool = True
    microbatch_tokens: int | None = None

    @property
    def small(self) -> str:
        """Why FLOPs do not tell the time of a micro-batch, in words; "" where they do."""
        if self.microbatch_tokens is None:
            return ""
        flops = self.microbatch_tokens * layer_flops(self.shape, self.sequence_length)
        if flops >= SMALLEST_LAYER:
            return ""
        return (
            f"a micro-batch has {flops / 1e9:.2g} GFLOP in a layer, and below "
            f"{SMALLEST_LAYER / 1e9:.2g} they do not tell its time"
        )

    def layout(self, choice: PipelineChoice) -> Layout:
        """Layout of the pipeline axis alone."""
        bare = pipeline_layout(choice.schedule, self.pipeline, choice.stages_per_rank)
        cut = choice.layers_per_stage
        return bare if cut is None else with_layers(bare, cut)


def stage_durations(work: PipelineWork, layout: Layout) -> list[dict[Op, float]]:
    """FLOPs for one token of each action of each stage.

    A product takes 2 FLOPs an element of its matrix in the forward, and as many for each of its two
    gradients. The scores have no weights: 4 s h forward, 8 s h for their inputs' gradients.
    """
    shape = work.shape
    product = 2 * layer_matrix_parameters(shape)
    scores = 4 * work.sequence_length * shape.hidden_size
    found = []

    for stage in range(layout.num_stages):
        count = len(layout.layers_of(stage, shape.num_layers))
        forward = count * (product + scores)
        gradient_input = count * (product + 2 * scores)
        gradient_weight = count * product

        if stage == layout.num_stages - 1:
            third = head_flops(shape) // 3
            forward += 3 * third if work.fused_loss else third
            gradient_input += 0 if work.fused_loss else third
            gradient_weight += 0 if work.fused_loss else third

        found.append(
            {
                Op.FORWARD: float(forward),
                Op.BACKWARD: float(gradient_input + gradient_weight),
                Op.BACKWARD_INPUT: float(gradient_input),
                Op.BACKWARD_WEIGHT: float(gradient_weight),
            }
        )
    return found


def simulated(work: PipelineWork, choice: PipelineChoice) -> float:
    """Time of a step in FLOPs of one rank for one token of each micro-batch.

    Raises ScheduleError for a schedule that does not allow these numbers.
    """
    layout, count = work.layout(choice), work.num_microbatches
    # A steady pipeline goes at the pace of its slowest rank.
    most = SIMULATED_ROUNDS * work.pipeline
    shown = count if count <= most else most + count % work.pipeline

    graph = program_graph(choice.schedule, work.pipeline, shown, choice.stages_per_rank)
    seconds = graph.seconds(table(stage_durations(work, layout), 0.0))
    slowest = max(rank_flops(work.shape, layout, work.sequence_length))
    return seconds + (count - shown) * slowest


def choose_cut(work: PipelineWork, schedule: str, stages_per_rank: int) -> tuple[Cut, str]:
    """Return the balanced cut where it pays, else even stages; and why, in words.

    Where the layers do not divide evenly there is always a cut. There must be a layer for each
    stage.
    """
    even = PipelineChoice(schedule, stages_per_rank, None)
    layout = work.layout(even)
    if work.small:
        nearly = nearly_even_layers(work.shape.num_layers, layout.num_stages)
        found = None if len(set(nearly)) == 1 else nearly
        return found, f"{'null' if found is None else _cut_text(found)}: {work.small}"

    cut = balanced_layers(work.shape, layout, work.sequence_length)
    assert cut is not None, "a rule of the config asks for a layer in each stage"

    if work.shape.num_layers % layout.num_stages:
        return cut, f"{_cut_text(cut)}, balanced by FLOPs"
    if len(set(cut)) == 1:
        return None, "null, which is balanced"

    saved = 1 - simulated(work, replace(even, layers_per_stage=cut)) / simulated(work, even)
    if saved >= PAYS:
        return cut, f"{_cut_text(cut)}: {saved:.1%} less time than even stages"
    return None, f"null: {_cut_text(cut)} would save {saved:.1%} of a step, less than {PAYS:.0%}"


@dataclass(frozen=True)
class Asked:
    """What the config says of the pipeline; `auto` is to be chosen."""

    schedule: str
    stages_per_rank: int
    """With the schedule `auto`, the most that a rank may have."""
    layers_per_stage: Sequence[int] | str | None

    def schedules(self, work: PipelineWork) -> list[tuple[str, int]]:
        """Return the schedules to compare, each with its stages on a rank."""
        if self.schedule != AUTO:
            return [(self.schedule, self.stages_per_rank)]
        if work.pipeline == 1:
            return [("1f1b", 1)]

        several = self.stages_per_rank
        found = [("1f1b", 1), ("zb-h1", 1)]
        if several == 1:
            return found
        # A cut by hand names the stages.
        if not isinstance(self.layers_per_stage, str | None):
            return [("interleaved", several)]

        if self._turns(work) and self._fits(work, several):
            found.append(("interleaved", several))
        if self._fits(work, 2):
            found.append(("zb-v", 2))
        return found

    def _fits(self, work: PipelineWork, stages_per_rank: int) -> bool:
        """Whether there are layers for so many stages, as many on each unless a cut is chosen."""
        layers, stages = work.shape.num_layers, work.pipeline * stages_per_rank
        return layers >= stages if self.layers_per_stage == AUTO else layers % stages == 0

    @staticmethod
    def _turns(work: PipelineWork) -> bool:
        """Whether the micro-batches divide into the groups of an interleaved schedule."""
        return work.num_microbatches % work.pipeline == 0


def choose_pipeline(
    work: PipelineWork, asked: Asked, bytes_of: Callable[[PipelineChoice], int]
) -> tuple[PipelineChoice, str]:
    """Return the fastest schedule with its cut, and why, in words.

    `bytes_of` returns the bytes of the rank that needs most. 1F1B comes first, and what saves less
    than `PAYS` of its step is not taken.
    """
    choices: list[PipelineChoice] = []
    reasons: dict[PipelineChoice, str] = {}
    for schedule, stages_per_rank in asked.schedules(work):
        cut, reason = _cut_asked(work, asked, schedule, stages_per_rank)
        choices.append(PipelineChoice(schedule, stages_per_rank, cut))
        reasons[choices[-1]] = reason

    chosen, reason = (
        (choices[0], "") if asked.schedule != AUTO else _fastest(work, choices, bytes_of)
    )
    cut_reason = reasons[chosen]
    if asked.layers_per_stage == AUTO and chosen.layers_per_stage is not None:
        cut_reason += _memory_text(work, chosen, bytes_of)
    return chosen, "; ".join(filter(None, (reason, cut_reason)))


def _memory_text(
    work: PipelineWork, chosen: PipelineChoice, bytes_of: Callable[[PipelineChoice], int]
) -> str:
    """Say what a cut needs beside even stages, on the rank that needs most."""
    if work.shape.num_layers % work.layout(chosen).num_stages:
        return ""
    more = bytes_of(chosen) / bytes_of(replace(chosen, layers_per_stage=None)) - 1
    return f", {abs(more):.0%} {'less' if more < 0 else 'more'} memory on the fullest rank"


def _cut_asked(
    work: PipelineWork, asked: Asked, schedule: str, stages_per_rank: int
) -> tuple[Cut, str]:
    if asked.layers_per_stage is None or work.pipeline * stages_per_rank == 1:
        return None, ""
    if asked.layers_per_stage != AUTO:
        return tuple(int(count) for count in asked.layers_per_stage), ""
    cut, reason = choose_cut(work, schedule, stages_per_rank)
    return cut, f"parallel.layers_per_stage auto is {reason}"


def _fastest(
    work: PipelineWork,
    choices: Sequence[PipelineChoice],
    bytes_of: Callable[[PipelineChoice], int],
) -> tuple[PipelineChoice, str]:
    """Return the fastest of the choices that keep within the memory of the first."""
    first, *others = choices
    if not others:
        return first, ""
    if work.small:
        return first, f"parallel.schedule auto is {first.schedule}: {work.small}"

    base = simulated(work, first)
    saved: Mapping[PipelineChoice, float] = {
        other: 1 - simulated(work, other) / base for other in others
    }
    notes = []
    for other in sorted(others, key=lambda other: -saved[other]):
        name = other.schedule
        if saved[other] < PAYS:
            notes.append(f"{name} would save {saved[other]:.1%} of a step, less than {PAYS:.0%}")
            continue
        larger = bytes_of(other) / bytes_of(first)
        if larger > MEMORY:
            notes.append(f"{name} would need {larger - 1:.0%} more memory")
            continue
        notes.insert(0, f"{saved[other]:.1%} less time than {first.schedule}")
        return other, f"parallel.schedule auto is {name}: {', '.join(notes)}"
    return first, f"parallel.schedule auto is {first.schedule}: {', '.join(notes)}"


def _cut_text(cut: Sequence[int]) -> str:
    return f"[{', '.join(map(str, cut))}]"
