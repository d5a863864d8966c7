"""GPU benchmark part `layers`: as many of K2's layers as fit.

A step, and forward and backward alone.

- First the choices of `auto`, then one changed at a time: attention, compilation, loss,
  elementwise, recomputation.

Alternatives considered:
- The whole product of the choices: hours for less insight.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.cpu.contract import UnavailableError
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import LR, forward_backward, make_engine, token_ids, world_of_one
from benchmarks.gpu.memory import planned, states_bytes
from benchmarks.gpu.sizes import Batch, Sizes, sizes
from benchmarks.gpu.timing import Timer
from k2train.parallel.grid import ProcessGrid
from k2train.plan.cost import ModelShape, flops_per_token
from k2train.text import bytes_text

# Attention that keeps a score for every pair is left out: at these lengths it needs gigabytes a
# layer.
VARIANTS: tuple[tuple[str, str], ...] = (
    ("recompute", "selective"),
    ("recompute", "full"),
    ("compile", "off"),
    ("loss", "reference"),
    ("elementwise", "reference"),
    ("attention", "sdpa"),
    ("attention", "flash"),
    ("attention", "cudnn"),
    ("attention", "flash_attn_2"),
    ("attention", "flash_attn_3"),
    ("attention", "flash_attn_4"),
    ("attention", "transformer_engine"),
    ("matmul", "fp8"),
)
MICROBATCHES = 4
"""Of the step that shows what the optimizer costs when it is shared by several micro-batches."""
SPARE = 0.95
"""Share of the device's memory that states may fill: contexts of the libraries lie outside torch's
account.
"""
NEEDS_SECONDS = 8.0
"""Below this no further case is begun."""


@dataclass(frozen=True)
class Case:
    """One engine, and what is timed: `step`, `forward_backward`."""

    what: str
    shape: ModelShape
    batch: Batch
    timed: tuple[str, ...]
    kernels: dict[str, Any] = field(default_factory=dict)
    microbatches: int = 1


def run(bench: Bench) -> None:
    """Measure the `auto` choices, then one change at a time."""
    work = sizes(bench.dry)
    with world_of_one(bench) as grid:
        fitting = [
            case
            for batch in work.k2_batches
            if (case := most_layers(bench, grid, work, batch)) is not None
        ]
        for case in fitting:
            what = f"auto, {MICROBATCHES} micro-batches"
            attempt(
                bench,
                grid,
                work,
                replace(case, what=what, timed=("step",), microbatches=MICROBATCHES),
            )
        for key, value in VARIANTS:
            for case in fitting:
                changed = replace(
                    case, what=f"{key}: {value}", timed=("forward_backward",), kernels={key: value}
                )
                attempt(bench, grid, work, changed)


def most_layers(bench: Bench, grid: ProcessGrid, work: Sizes, batch: Batch) -> Case | None:
    """Measure the `auto` choices with the most layers that fit; None when none did."""
    for layers in work.k2_layers:
        case = Case(
            "auto", replace(work.k2, num_layers=layers), batch, ("step", "forward_backward")
        )
        if attempt(bench, grid, work, case):
            return case
    return None


def attempt(bench: Bench, grid: ProcessGrid, work: Sizes, case: Case) -> bool:
    """Measure one row; returns whether it was possible."""
    labels = {
        "batch": str(case.batch),
        "layers": case.shape.num_layers,
        "shape": asdict(case.shape),
    }
    name = f"{case.shape.num_layers} layers, {case.batch}: {case.what}"
    needs = 0.0 if bench.dry else NEEDS_SECONDS
    return (
        bench.attempt(name, lambda: measure(bench, grid, case, work.rounds), needs, **labels)
        is not None
    )


def measure(bench: Bench, grid: ProcessGrid, case: Case, rounds: int) -> Mapping[str, Any]:
    """Seconds, model FLOP/s and peak memory of one engine."""
    total, states = bench.total_bytes(), states_bytes(case.shape, "bf16")
    if total is not None and states > SPARE * total:
        raise UnavailableError(f"states alone need {bytes_text(states)} of {bytes_text(total)}")

    before = bench.held_bytes()
    engine = make_engine(grid, case.shape, case.batch, case.microbatches, case.kernels)
    held = bench.held_bytes()
    ids = token_ids(bench.device, case.shape.vocab_size, case.batch, case.microbatches)
    engine.train_step(ids, LR)
    # Read before there is a timer: what that empties caches with is not the engine's.
    bench.forget_peak()
    engine.train_step(ids, LR)
    last = engine.train_step(ids, LR)
    peak, plan = bench.peak_bytes(), planned(engine)
    works = {
        "step": lambda: engine.train_step(ids, LR),
        "forward_backward": lambda: forward_backward(engine, ids),
    }
    took = Timer(bench).in_turns([works[key] for key in case.timed], rounds, warm_up=1)
    seconds = {key: timing.median for key, timing in zip(case.timed, took, strict=True)}

    return {
        "kernels": str(engine.kernels),
        "spread": max(timing.spread for timing in took),
        **rates(case, seconds.get("step"), seconds.get("forward_backward")),
        "peak_bytes": above(peak, before),
        "planned_bytes": plan.total_bytes,
        "plan": asdict(plan),
        "states_measured_bytes": above(held, before),
        "states_planned_bytes": states,
        "loss": last.loss,
    }


def rates(case: Case, step: float | None, inner: float | None) -> dict[str, float | None]:
    """Tokens and model FLOPs per second.

    With `causal`, without the pairs that causality excludes.
    """
    tokens, shape, length = (
        case.batch.tokens * case.microbatches,
        case.shape,
        case.batch.length_tokens,
    )
    flops = tokens * flops_per_token(shape, length)
    left_out = 6 * tokens * shape.num_layers * length * shape.hidden_size

    return {
        "step_seconds": step,
        "forward_backward_seconds": inner,
        "tokens_per_second": step and tokens / step,
        "step_flops_per_second": step and flops / step,
        "flops_per_second": inner and flops / inner,
        "flops_per_second_causal": inner and (flops - left_out) / inner,
    }


def above(now: int | None, before: int | None) -> int | None:
    """Difference in bytes; None without a counter."""
    return None if now is None or before is None else now - before
