"""Pipeline schedule benchmark: planned and measured bubble, tokens per second and pictures.

    python tools/bench_schedules.py [--processes N] [--svg DIR] [dotted.key=value ...]

- The processes (gloo, CPU) build every schedule once and take its steps in turns.
- Layers are distributed so that the rank with the head has no more work than the others
  (--even: as many on every stage).
- The planned bubble is given twice: for equal durations, and for the measured ones. The difference
  between the second and the measured bubble is waiting that the plan does not model: transfers and
  other load on the cores.
- This driver imports no torch.

Exit codes: 0 done; 1 a process failed; 2 a usage error, one line each on stderr.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import Parser, command, positive

from benchmarks.ranks import CONFIG, run_ranks
from k2train.config.load import Config, load_config
from k2train.errors import EXIT_DONE, EXIT_FAILED, ConfigError, RunError
from k2train.plan.action import Action, Op
from k2train.plan.balance import balanced_layers
from k2train.plan.draw import draw, svg
from k2train.plan.schedule import SCHEDULES, Program, pipeline_layout
from k2train.plan.simulate import Span, bubble_fraction, peak_in_flight, simulate
from k2train.text import markdown_table
from k2train.train.setup import Setup, architecture_of

HEADINGS = (
    "schedule", "layers per stage", "planned bubble", "with measured durations", "measured",
    "tokens/s", "speed against the first", "activations held", "of these before I",
)  # fmt: skip
WORK = (
    "model.num_layers=8",
    "model.hidden_size=256",
    "model.ffn_hidden_size=688",
    "model.num_heads=8",
    "model.num_kv_heads=8",
    "model.vocab_size=8192",
    "data.sequence_length=256",
    "batch.global_sequences=16",
    "batch.micro_sequences=4",
    "precision=fp32",
    "kernels.compile=off",
)
Durations = dict[tuple[Op, int], float]


@dataclass(frozen=True)
class Outcome:
    """Result of one schedule: its plan, and its measured steps."""

    kind: str
    config: Config
    programs: tuple[Program, ...]
    seconds: float
    """Median seconds of a step, optimizer included."""
    loss: float
    measured: tuple[Span, ...]
    """Spans of the step with the median bubble."""
    bubble: float
    durations: Durations

    @property
    def planned(self) -> tuple[Span, ...]:
        """Spans for equal durations, a backward twice a forward."""
        return simulate(self.programs)

    @property
    def expected(self) -> tuple[Span, ...]:
        """Spans for the measured durations, with free transfers."""
        return simulate(
            self.programs, lambda action: self.durations.get((action.op, action.stage), 0.0)
        )


@command
def main(arguments: Sequence[str]) -> int:
    """Run every schedule, print table and pictures, and return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    runs = [_overrides(kind, options) for kind in options.schedules]
    configs = [load_config(str(CONFIG), run) for run in runs]
    programs = [Setup.of(config, options.processes).programs for config in configs]
    if options.svg:
        try:
            Path(options.svg).mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise RunError(f"--svg {options.svg} cannot be made: {problem.strerror}") from None

    ranks = run_ranks(runs, options.processes, options.steps, options.warmup, options.threads)
    if ranks is None:
        return EXIT_FAILED

    outcomes = [
        _outcome(config, program, [rank[index] for rank in ranks], options)
        for index, (config, program) in enumerate(zip(configs, programs, strict=True))
    ]
    print("\n".join(_report(outcomes, options)), flush=True)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="bench_schedules",
        description="Every pipeline schedule, planned and measured side by side.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="dotted.key=value",
        help="another model, batch or tensor degree",
    )
    parser.add_argument("--processes", type=positive, default=2, metavar="N", help="default 2")
    parser.add_argument(
        "--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES), metavar="KIND"
    )
    parser.add_argument(
        "--steps", type=positive, default=7, metavar="N", help="measured steps of each; default 7"
    )
    parser.add_argument(
        "--warmup", type=positive, default=2, metavar="N", help="steps before; default 2"
    )
    parser.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="of each process; default 1"
    )
    parser.add_argument("--even", action="store_true", help="as many layers on every stage")
    parser.add_argument("--svg", metavar="DIR", help="write the pictures there, too")
    parser.add_argument(
        "--width", type=positive, default=110, metavar="COLUMNS", help="width of the pictures"
    )
    return parser


def _overrides(kind: str, options: argparse.Namespace) -> list[str]:
    """Overrides that turn the shipped config into this run.

    Raises ConfigError where the schedule cannot do it.
    """
    base = load_config(str(CONFIG), [*WORK, *options.overrides])
    tensor, layers = base.parallel.tensor, base.model.num_layers
    pipeline, rest = divmod(options.processes, tensor)
    if rest or pipeline < 2:
        raise ConfigError(
            f"--processes ({options.processes}) must be parallel.tensor ({tensor}) times at least "
            f"2; nearest: {2 * tensor}"
        )
    stages_per_rank = 2 if kind in ("interleaved", "zb-v") else 1

    keys = [
        f"parallel.pipeline={pipeline}",
        f"parallel.schedule={kind}",
        f"parallel.stages_per_rank={stages_per_rank}",
    ]

    split = balanced_layers(
        architecture_of(base),
        pipeline_layout(kind, pipeline, stages_per_rank),
        base.data.sequence_length,
    )
    if split is None:
        raise ConfigError(
            f"model.num_layers ({layers}) must be at least {pipeline * stages_per_rank} for "
            f"schedule {kind} on {pipeline} pipeline ranks; raise it, lower --processes, or leave "
            "it out of --schedules"
        )

    cut = "null" if options.even else f"[{','.join(map(str, split))}]"
    keys.append(f"parallel.layers_per_stage={cut}")
    return [*WORK, *options.overrides, *keys]


def _outcome(
    config: Config,
    programs: tuple[Program, ...],
    ranks: list[list[Any]],
    options: argparse.Namespace,
) -> Outcome:
    """Combine the ranks' steps of one schedule.

    Spans come from each pipeline rank's first process.
    """
    layout = Setup.of(config, options.processes).layout

    # Ranks of one pipeline position are neighbours; the first one represents all.
    each = options.processes // layout.pipeline
    steps = [
        tuple(
            Span(pp, Action(Op(op), stage, microbatch), start, end)
            for pp in range(layout.pipeline)
            for op, stage, microbatch, start, end in ranks[pp * each][index]["spans"]
        )
        for index in range(options.steps)
    ]

    found: dict[tuple[Op, int], list[float]] = {}
    for step in steps:
        for span in step:
            key = (span.action.op, span.action.stage)
            found.setdefault(key, []).append(span.end_seconds - span.start_seconds)

    # A real step, not an average of several, so that its picture is one that happened.
    middle = sorted(steps, key=bubble_fraction)[len(steps) // 2]
    return Outcome(
        kind=config.parallel.schedule,
        config=config,
        programs=programs,
        seconds=statistics.median(step["seconds"] for step in ranks[0]),
        loss=ranks[0][-1]["loss"],
        measured=middle,
        bubble=bubble_fraction(middle),
        durations={key: statistics.median(values) for key, values in found.items()},
    )


def _report(outcomes: Sequence[Outcome], options: argparse.Namespace) -> list[str]:
    batch, length = outcomes[0].config.batch, outcomes[0].config.data.sequence_length
    tokens = batch.global_sequences * length
    lines = [
        f"{options.processes} processes, {options.threads} thread(s) each; {tokens:,} tokens per "
        f"step in micro-batches of {batch.micro_sequences} x {length}; medians of {options.steps} "
        "steps, schedules in turns",
        "",
    ]

    rows = []
    for one in outcomes:
        split = one.config.parallel.layers_per_stage
        rows.append(
            [
                one.kind,
                "even" if split is None else " ".join(map(str, split)),
                f"{bubble_fraction(one.planned):.1%}",
                f"{bubble_fraction(one.expected):.1%}",
                f"{one.bubble:.1%}",
                f"{tokens / one.seconds:,.0f}",
                f"{outcomes[0].seconds / one.seconds:.3f}",
                *(" ".join(map(str, peak_in_flight(one.programs, u))) for u in (False, True)),
            ]
        )

    lines += [
        *markdown_table(HEADINGS, rows),
        "",
        "Activations in stages x micro-batches, by pipeline rank; a stage of interleaved and zb-v "
        "is half as large.",
    ]
    lines.append(
        "Loss of the last step: " + ", ".join(sorted({f"{one.loss:.9g}" for one in outcomes}))
    )

    pictures: list[tuple[str, Callable[[Outcome], tuple[Span, ...]]]] = [
        ("planned with the measured durations", lambda one: one.expected),
        ("measured", lambda one: one.measured),
    ]

    for one in outcomes:
        for name, spans_of in pictures:
            lines += ["", f"{one.kind}, {name}:", draw(spans_of(one), options.width)]
            if options.svg:
                file = Path(options.svg) / f"{one.kind}_{name.split()[0]}.svg"
                file.write_text(svg(spans_of(one)), encoding="utf-8")
    return lines


if __name__ == "__main__":
    sys.exit(main())
