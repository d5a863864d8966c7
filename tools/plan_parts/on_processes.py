"""Report of a config on a number of processes: grid, states, memory, step, schedule and picture.

- It calls the functions that the trainer calls, so it shows what a run would do.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from k2train.config.load import Config
from k2train.plan import cost
from k2train.plan.action import Op
from k2train.plan.balance import balanced_layers, rank_flops, with_layers
from k2train.plan.connections import connections
from k2train.plan.draw import draw
from k2train.plan.layout import Layout
from k2train.plan.schedule import Program
from k2train.plan.simulate import Span, bubble_fraction, peak_in_flight, simulate
from k2train.text import bytes_text, counted
from k2train.train.memory_report import memory_table
from k2train.train.setup import Setup
from k2train.train.start_notes import bf16_note

GRID_LINES = 16
PROGRAM_ACTIONS = 48
UNIT = "forwards of one stage"
"""Unit of the planned spans."""


def plan(
    config: Config, world_size: int, width: int = 100, full: bool = False
) -> tuple[str, tuple[Span, ...]]:
    """Report and planned spans of a config on a world of processes.

    Raises UserError when the config does not fit the world.
    """
    setup = Setup.of(config, world_size)
    layout, programs, shape = setup.layout, setup.programs, setup.architecture
    spans = simulate(programs)
    sections = (
        _grid_lines(layout, shape.num_layers, full),
        _model_lines(shape, layout, setup.precision),
        memory_table(setup),
        _step_lines(setup),
        _schedule_lines(setup.config.parallel.schedule, programs, spans, width, full)
        + _balance_lines(setup),
        [draw(spans, width, UNIT)],
        [note for note in (bf16_note(config),) if note],
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines), spans


def _span_text(numbers: Sequence[int]) -> str:
    """Format `0-3`, or `5` for a single number."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _stages_text(layout: Layout, pp: int, num_layers: int) -> str:
    stages = layout.stages_of(pp)
    layers = ", ".join(_span_text(layout.layers_of(stage, num_layers)) for stage in stages)
    return f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}  layers {layers}"


def _grid_lines(layout: Layout, num_layers: int, full: bool) -> list[str]:
    lines = [
        (
            f"grid      world {layout.world_size} = pipeline {layout.pipeline} x data "
            f"{layout.data} x tensor {layout.tensor}; {layout.stages_per_rank} pipeline stage(s) "
            f"per rank, {layout.num_stages} in all"
        )
    ]

    if full or layout.world_size <= GRID_LINES:
        for rank in range(layout.world_size):
            position = layout.coordinate(rank)
            stages = _stages_text(layout, position.pp, num_layers)
            lines.append(
                f"  rank {rank:<4} pp {position.pp}  dp {position.dp}  tp {position.tp}  {stages}"
            )
        return lines

    # Too many ranks for a line each: one line per pipeline rank, and the groups by axis.
    per_pipeline_rank = layout.data * layout.tensor
    for pp in range(layout.pipeline):
        ranks = range(pp * per_pipeline_rank, (pp + 1) * per_pipeline_rank)
        lines.append(
            f"  pp {pp}  ranks {_span_text(ranks):<11} {_stages_text(layout, pp, num_layers)}"
        )

    for axis in ("tp", "dp", "pp"):
        groups = layout.groups(axis)
        lines.append(
            f"  {axis} groups: {len(groups)} of {len(groups[0])}, the first "
            f"{_group_text(groups[0])}"
        )
    lines += _connection_lines(layout)
    return lines


def _connection_lines(layout: Layout) -> list[str]:
    """Connections of a rank, whose number grows with the world."""
    open_ = connections(layout, "cuda")
    return [
        f"  each rank: up to {counted(open_.communicators, 'communicator')} of NCCL, about "
        f"{bytes_text(open_.communicator_bytes)} besides the plan (estimate)",
        f"  each rank: {open_.sockets} sockets, up to {open_.files} open files",
    ]


def _group_text(group: Sequence[int]) -> str:
    shown = [str(rank) for rank in group]
    return " ".join(shown if len(shown) <= 8 else [*shown[:4], "...", shown[-1]])


def _model_lines(shape: cost.ModelShape, layout: Layout, precision: str) -> list[str]:
    lines = [
        (
            f"model     {cost.parameters(shape):,} parameters: {cost.layer_parameters(shape):,} in "
            f"each of {shape.num_layers} layers, {cost.embedding_parameters(shape):,} in embedding "
            "and head"
        ),
        f"states    memory of one rank between steps ({precision} weights)",
        "  pp     parameters      weights    gradients    optimizer        total",
    ]
    for pp in range(layout.pipeline):
        state = cost.state_bytes(shape, layout, precision, pp)
        sizes = (
            state.weights_bytes,
            state.gradients_bytes,
            state.optimizer_bytes,
            state.total_bytes,
        )
        count = cost.rank_parameters(shape, layout, pp)
        lines.append(
            f"  {pp:<2} {count:>14,} " + " ".join(f"{bytes_text(size):>12}" for size in sizes)
        )
    return lines


def _step_lines(setup: Setup) -> list[str]:
    config, layout, tokens = setup.config, setup.layout, setup.step_tokens
    sequences, length = config.batch.global_sequences, config.data.sequence_length
    per_token = cost.flops_per_token(setup.architecture, length)
    most = "at most " if config.data.loss_mask == "use" else ""
    return [
        f"step      {counted(sequences, 'sequence')} of {length:,} = {tokens:,} tokens, "
        f"{most}{counted(setup.targets, 'target')}",
        (
            f"  per data-parallel rank: {counted(sequences // layout.data, 'sequence')} in "
            f"{setup.num_microbatches:,} micro-batches of {config.batch.micro_sequences:,}"
        ),
        (
            f"  model FLOPs: {tokens * per_token:.4g} per step, "
            f"{tokens * per_token / layout.world_size:.4g} per rank, "
            f"{per_token:.4g} per token"
        ),
        f"  warm-up: {counted(config.lr.warmup_steps, 'step')}, "
        f"{config.lr.warmup_steps * tokens:,} tokens",
    ]


def _program_lines(pp: int, program: Program, width: int, full: bool) -> list[str]:
    shown = [str(action) for action in program]
    if not full and len(shown) > PROGRAM_ACTIONS:
        half = PROGRAM_ACTIONS // 2
        shown = [*shown[:half], f"... {len(shown) - 2 * half} more (--full) ...", *shown[-half:]]
    head = f"  pp {pp}  "
    return textwrap.wrap(
        " ".join(shown),
        width=max(width, 40),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _schedule_lines(
    kind: str, programs: Sequence[Program], spans: Sequence[Span], width: int, full: bool
) -> list[str]:
    bubble = bubble_fraction(spans)
    lines = [
        f"schedule  {kind}; bubble {bubble:.2%} of the step, {bubble / (1 - bubble):.2%} of the "
        "time without it",
        "  (a backward takes two forwards, its halves I and W one each, transfers are free)",
        "  most activations held, in stages x micro-batches, by pipeline rank: "
        + " ".join(map(str, peak_in_flight(programs))),
    ]

    ops = {action.op for program in programs for action in program}
    words = "F forward B backward"
    if Op.BACKWARD_WEIGHT in ops:
        words = "F forward I gradient of the input W gradients of the weights"
        held = " ".join(map(str, peak_in_flight(programs, until_input=True)))
        lines.append(f"  of these, waiting for I (the others keep what W needs): {held}")

    lines.append(
        f"  program of each pipeline rank: stage, {words} S send R receive, micro-batch, peer"
    )
    for pp, program in enumerate(programs):
        lines += _program_lines(pp, program, width, full)
    return lines


def _balance_lines(setup: Setup) -> list[str]:
    """Share of the busiest pipeline rank, and a better split of layers if any.

    Empty for one rank.
    """
    config, layout, shape = setup.config, setup.layout, setup.architecture
    if layout.pipeline == 1:
        return []
    length = config.data.sequence_length

    def slowest(layout: Layout) -> float:
        flops = rank_flops(shape, layout, length)
        return max(flops) * len(flops) / sum(flops)

    lines = [
        f"  the busiest pipeline rank has {slowest(layout):.1%} of the average FLOPs, the head "
        "included"
    ]

    if setup.pipeline_reason:
        lines += [f"  {reason}" for reason in setup.pipeline_reason.split("; ")]
        return lines

    # Only a hint: an explicit split is the user's choice.
    better = balanced_layers(shape, layout, length)
    if config.parallel.layers_per_stage is None and better is not None:
        share = slowest(with_layers(layout, better))
        if share < slowest(layout) - 0.001:
            counts = ",".join(map(str, better))
            lines.append(
                f"  hint: parallel.layers_per_stage=[{counts}] would reduce that to {share:.1%}; "
                "auto takes it where it pays"
            )
    return lines
