"""Layouts as text and JSON: the best ten, what is excluded, one step by term, two compared.

- Every number says its unit; memory is in GiB, time in seconds.
- The interval of a prediction stands beside it, with what it is made of.

Alternatives considered:
- Only the winner: a team wants to see how near the second is, and what its own layout loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2train.plan.efficiency import GENERATIONS, NEWEST
from k2train.plan.hardware import GIB
from k2train.plan.program_memory import RESERVED
from k2train.plan.search import (
    RESERVE_BYTES,
    Found,
    Ranked,
    Space,
    broken_rule,
    memory_problem,
    rank_of,
    terms_of,
)
from k2train.plan.uncertainty import Interval, interval
from k2train.planner.layouts import DAY, Question
from k2train.text import table

TOP = 10
OWN = "config"
"""Label of the layout that the config has."""
NEAR = 1.03
"""Step for the fastest one's up to which layouts count as equal: measured choices were as good."""
MOSTLY_HOST = 0.35
"""Uncertainty from the host of a step that waits for it half of the time: half of its spread."""
MIB = 2**20
MEMORY = ("weights", "gradients", "optimizer", "activations", "working", "transfers")
LEAST_SECONDS = 5e-4
"""Terms below this are not shown."""


def table_lines(question: Question, found: Found, best: list[Ranked]) -> list[str]:
    """The best layouts as a table with the config's own, and the excluded ones by rule."""
    space, (own, problem) = question.space, _own_layout(question)
    same = [one for one in best if own and one.candidate.choice == own.candidate.choice]
    shown = [*best, *([own] if own and not same else [])]
    labels = [
        f"{OWN} {number}" if one in same else str(number) for number, one in enumerate(best, 1)
    ] + [OWN] * (len(shown) - len(best))

    count = sum(map(len, found.excluded.values()))
    lines = [
        f"{len(found.candidates):,} layouts of {space.devices:,} {space.cluster.device.name} are "
        f"legal and fit; {count:,} are excluded. The best {len(best)}:",
        *_layout_table(question, labels, shown),
        *_advice(question, best, problem),
        "",
        f"memory of the worst rank, {_unit(shown)[0]}, the optimizer shared by data-parallel ranks "
        "(ZeRO-1)",
        *table(
            ["", *MEMORY],
            [
                [label, *_memory_cells(one, _unit(shown)[1])]
                for label, one in zip(labels, shown, strict=True)
            ],
        ),
        "",
        "excluded, by the first rule that a layout breaks",
    ]
    for rule, ones in sorted(found.excluded.items(), key=lambda item: -len(item[1])):
        choice, numbers = ones[0]
        lines.append(f"  {len(ones):>6,}  {rule}: {numbers}, first {choice.text()}")
    return lines


def _layout_table(question: Question, labels: list[str], shown: list[Ranked]) -> list[str]:
    """One row for each layout: its grid, seconds, utilisation, memory, and what the run costs."""
    space, (unit, size) = question.space, _unit(shown)
    headings = ["", "tensor", "pipeline", "stages", "data", "micro", "recompute", "step s"]
    headings += ["tok/s/GPU", "MFU", "bubble", unit, "days", "MWh", "t CO2eq"]
    rows = []
    for label, one in zip(labels, shown, strict=True):
        c, cost = one.candidate.choice, question.cost(one.seconds)
        rows.append(
            [
                label,
                *map(str, (c.tensor, c.pipeline, c.stages_per_rank, space.data(c))),
                str(c.micro_sequences),
                c.recompute,
                seconds_text(one.seconds),
                f"{tokens_per_device(space, one):,.0f}",
                f"{utilisation(space, one):.1%}",
                f"{one.step.bubble:.1%}",
                f"{one.candidate.memory.total_bytes / size:.1f}",
                *map(_cost_text, cost.values()),
            ]
        )
    return table(headings, rows, left={"recompute"})


def _cost_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value >= 0.05 else "<0.1"


def _own_layout(question: Question) -> tuple[Ranked | None, str]:
    """The config's own layout, and why it is none: not legal on so many devices, or too large."""
    space, choice = question.space, question.configured
    ranks = choice.tensor * choice.pipeline
    if space.devices % ranks:
        return None, f"{space.devices:,} devices are no multiple of tensor x pipeline = {ranks}"
    broken = broken_rule(space, choice)
    if broken:
        return None, ": ".join(broken)
    own = rank_of(space, choice)
    problem = memory_problem(space, own.candidate.memory)
    return (None, f"memory: {problem}") if problem else (own, "")


def _advice(question: Question, best: list[Ranked], problem: str) -> list[str]:
    """What to do with the table: the first layout as overrides, and how sure the order is.

    `problem`: why the config's own layout is not in it; empty if it is.
    """
    first = best[0]
    near = sum(one.seconds <= NEAR * first.seconds for one in best)
    lines = [f"the first as overrides: {overrides_text(first)}"]
    if near > 1:
        lines.append(
            f"{near} of them are within {NEAR - 1:.0%} of the first, nearer than the model can "
            "tell apart: take the one with the least memory, or measure"
        )
    if problem:
        lines.append(
            f"the config's own layout is excluded: {question.configured.text()}: {problem}"
        )
    return lines


def overrides_text(one: Ranked) -> str:
    """A layout as the overrides of a config."""
    c = one.candidate.choice
    return (
        f"parallel.tensor={c.tensor} parallel.pipeline={c.pipeline} "
        f"parallel.stages_per_rank={c.stages_per_rank} parallel.schedule={c.schedule} "
        f"batch.micro_sequences={c.micro_sequences} kernels.recompute={c.recompute}"
    )


def seconds_text(seconds: float) -> str:
    """Seconds with three digits at least, if they are milliseconds or more."""
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.4f}"


def _unit(shown: list[Ranked]) -> tuple[str, int]:
    """Unit of memory in which the layouts differ, and its bytes."""
    small = max(one.candidate.memory.total_bytes for one in shown) < GIB
    return ("MiB", MIB) if small else ("GiB", GIB)


def _memory_cells(one: Ranked, size: int) -> list[str]:
    terms = terms_of(one.candidate.memory)
    return [f"{terms[name] / size:.1f}" for name in MEMORY]


def _own_schedule_lines(question: Question) -> list[str]:
    """Say where the config's own schedule or stages are none of those that a search times."""
    parallel = question.config.parallel
    own = []
    if parallel.schedule not in ("1f1b", "interleaved", "auto"):
        own.append(f"parallel.schedule ({parallel.schedule})")
    if isinstance(parallel.layers_per_stage, list | tuple):
        own.append(f"parallel.layers_per_stage ({list(parallel.layers_per_stage)})")
    if not own:
        return []
    return [
        "  layouts are timed with even stages in 1f1b or interleaved, the config's, too: its own "
        f"{' and '.join(own)} counts in --before-you-burn and --compare"
    ]


def tokens_per_device(space: Space, one: Ranked) -> float:
    """Tokens a second of one device."""
    return space.global_sequences * space.sequence_length / one.seconds / space.devices


def utilisation(space: Space, one: Ranked) -> float:
    """Model FLOPs utilisation of the peak in the products' precision, 0 to 1, as a run has it."""
    flops = space.workload(one.candidate.choice).model_flops
    return flops / one.seconds / space.devices / space.cluster.device.peak(space.precision)


def explain_lines(question: Question, one: Ranked) -> list[str]:
    """One step by term, its interval, and what the interval is made of."""
    space, step = question.space, one.step
    sure = interval(space.workload(one.candidate.choice), space.cluster)
    lines = [
        f"{one.candidate.choice.text()} on {space.devices:,} {space.cluster.device.name}: "
        f"{step.seconds:.3f} s a step, {_interval_text(question, sure)}"
    ]
    for name, seconds in step.terms.items():
        if seconds > LEAST_SECONDS:
            lines.append(f"  {name:<18} {seconds:>9.3f} s {seconds / step.seconds:>7.1%}")
    lines.append(f"  uncertainty (standard deviation): {_parts(sure)}")
    if sure.parts.get("host", 0.0) > MOSTLY_HOST:
        lines.append(
            "  most of this step is its host's work, which no published row of this size measured; "
            "`tools/calibrate.py` measures a machine"
        )
    memory = one.candidate.memory
    unit, of = _unit([one])
    parts = ", ".join(f"{name} {size / of:.2f}" for name, size in terms_of(memory).items())
    lines.append(f"  memory of the worst rank, {unit}: {memory.total_bytes / of:.2f} = {parts}")
    needed = f"{(memory.total_bytes + RESERVE_BYTES) / GIB:.1f}"
    lines.append(
        f"  with {RESERVE_BYTES / GIB:.0f} GiB for driver, libraries, communicators: {needed} of "
        f"{space.cluster.device.memory_bytes / GIB:.1f} GiB"
    )
    most = RESERVED[1] * memory.total_bytes + RESERVE_BYTES
    if most > space.cluster.device.memory_bytes:
        lines.append(
            f"  tight: an allocator may reserve {RESERVED[1] - 1:.0%} more than is allocated, "
            f"{most / GIB:.1f} GiB in all; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True keeps "
            "it near the first number"
        )
    return lines + _own_schedule_lines(question)


def _doubt(question: Question) -> str:
    """Why an interval is wider."""
    if question.cluster.measured is not None:
        return "measured beside other programs"
    generation = question.cluster.device.generation
    if generation not in GENERATIONS:
        known = ", ".join(GENERATIONS)
        return f"device.generation {generation} is none of {known}: taken for {NEWEST}"
    return "this kind of device was never calibrated"


def _parts(sure: Interval) -> str:
    return ", ".join(f"{name} {part:.1%}" for name, part in sure.parts.items())


def why_not_lines(question: Question, best: Ranked, other: Ranked) -> list[str]:
    """Compare two layouts, term by term; say if the other one does not fit."""
    space = question.space
    lines = [
        f"best  {best.candidate.choice.text()}: {_sure_seconds(question, best)}",
        f"other {other.candidate.choice.text()}: {_sure_seconds(question, other)}, "
        f"{other.seconds / best.seconds - 1:+.1%}",
    ]
    problem = memory_problem(space, other.candidate.memory)
    if problem:
        lines.append(f"the other does not fit: {problem}")
    if other.candidate.choice.tensor > space.cluster.node:
        lines.append(
            f"the other's tensor-parallel ranks do not share a node ({space.cluster.node})"
        )
    first, second = best.step.terms, other.step.terms
    names = dict.fromkeys([*first, *second])
    shown = [name for name in names if max(first.get(name, 0), second.get(name, 0)) > LEAST_SECONDS]
    rows = [_difference(name, first.get(name, 0), second.get(name, 0), 3) for name in shown]
    rows.append(_difference("step", best.seconds, other.seconds, 3))
    first, second = terms_of(best.candidate.memory), terms_of(other.candidate.memory)
    memory = [_difference(name, first[name] / GIB, second[name] / GIB, 2) for name in MEMORY]
    return [
        *lines,
        *table(["seconds", "best", "other", "more"], rows, left={"seconds"}),
        *table(["GiB", "best", "other", "more"], memory, left={"GiB"}),
    ]


def _sure_seconds(question: Question, one: Ranked) -> str:
    """Seconds of a step with their interval, as `--explain` has them."""
    space = question.space
    sure = interval(space.workload(one.candidate.choice), space.cluster)
    return f"{one.seconds:.3f} s, {_interval_text(question, sure)}"


def _interval_text(question: Question, sure: Interval) -> str:
    """An interval, and why it may be wrong where nothing was measured."""
    doubt = "" if sure.calibrated else f" ({_doubt(question)})"
    return f"{seconds_text(sure.low)} to {seconds_text(sure.high)} s in nine of ten cases{doubt}"


def _difference(name: str, first: float, second: float, digits: int) -> list[str]:
    """Two values and what the second has more; the sign of what rounds to nothing is +."""
    more = round(second - first, digits) + 0.0
    return [name, f"{first:.{digits}f}", f"{second:.{digits}f}", f"{more:+.{digits}f}"]


def goodput_lines(question: Question, step_seconds: float) -> list[str]:
    """What failures and checkpoints take, and the best interval."""
    r = question.reliability
    lost = ", ".join(f"{name} {share:.2%}" for name, share in r.lost.items())
    lines = [
        f"goodput {r.goodput:.1%}: a failure every {r.between_failures / 3600:.1f} h on "
        f"{question.devices:,} devices (published rate), best interval between saves "
        f"{r.best_interval / 60:.0f} min, used {r.used_interval / 60:.0f} min",
        f"  lost for each second of training: {lost}",
    ]
    training = question.training_seconds(step_seconds)
    if training is None:
        lines.append("  days and energy need the tokens of the run: say --tokens, such as 1.4e12")
    else:
        days = training / DAY
        lines.append(f"  {days:.1f} days of steps, {days / r.goodput:.1f} with what is lost")
    return lines


def as_json(
    question: Question, found: Found, best: list[Ranked], named: Ranked | None = None
) -> dict[str, Any]:
    """The table and the exclusions, for programs; and a layout that a user named."""
    space = question.space
    return {
        "cluster": space.cluster.name,
        "devices": space.devices,
        "candidates": len(found.candidates),
        "excluded": {rule: len(ones) for rule, ones in found.excluded.items()},
        "goodput": question.reliability.goodput,
        "best": [_json_row(question, one) for one in best],
        **({} if named is None else {"named": _json_row(question, named)}),
    }


def _json_row(question: Question, one: Ranked) -> Mapping[str, Any]:
    space, choice = question.space, one.candidate.choice
    sure = interval(space.workload(choice), space.cluster)
    return {
        **vars(choice),
        "data": space.data(choice),
        "schedule": choice.schedule,
        "step_seconds": one.seconds,
        "low_seconds": sure.low,
        "high_seconds": sure.high,
        "calibrated": sure.calibrated,
        "terms_seconds": dict(one.step.terms),
        "tokens_per_second_per_device": tokens_per_device(space, one),
        "mfu": utilisation(space, one),
        "bubble": one.step.bubble,
        "memory_bytes": dict(terms_of(one.candidate.memory)),
        **question.cost(one.seconds),
    }
