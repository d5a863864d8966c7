"""GPU benchmark part `layers`: as many of K2's layers as fit.

A step, and forward and backward alone, with and without attention.

- First the choices of `auto`, then the same without attention, then one choice changed at a time:
  attention, compilation, loss, elementwise, recomputation.
- Without attention means that every layer takes the values for attention's output. Products, norms
  and copies stay.

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
from k2train.model.attention import Attention
from k2train.model.kernels.determinism import DETERMINISTIC
from k2train.parallel.grid import ProcessGrid
from k2train.plan.cost import ModelShape, flops_per_token
from k2train.text import bytes_text
from k2train.train.engine import Engine

# Attention that keeps a score for every pair is left out: at these lengths it needs gigabytes a
# layer.
VARIANTS: tuple[tuple[str, str], ...] = (
    ("recompute", "selective"),
    ("recompute", "full"),
    ("compile", "off"),
    ("loss", "reference"),
    ("elementwise", "reference"),
    ("norm", "triton"),
    ("elementwise", "triton"),
    ("loss", "fused"),
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
    attention: bool = True
    """False: attention is left out, and so are its FLOPs."""
    optional: bool = False
    """A choice that a device may not have."""


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
            bare = replace(
                case, what="without attention", timed=("forward_backward",), attention=False
            )
            attempt(bench, grid, work, bare)
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
                    case,
                    what=f"{key}: {value}",
                    timed=("forward_backward",),
                    kernels=kernels_with(key, value),
                    optional=True,
                )
                attempt(bench, grid, work, changed)


def kernels_with(key: str, value: str) -> dict[str, Any]:
    """Keys of `kernels` with one choice, and without determinism where that choice has none."""
    if key not in DETERMINISTIC or value in DETERMINISTIC[key]:
        return {key: value}
    return {key: value, "deterministic": False}


def most_layers(bench: Bench, grid: ProcessGrid, work: Sizes, batch: Batch) -> Case | None:
    """Measure the `auto` choices with the most layers that fit; None when none did."""
    for layers in work.k2_layers:
        shape = replace(work.k2, num_layers=layers)
        case = Case("auto", shape, batch, ("step", "forward_backward"))
        # Too many layers are no failure as long as fewer can be tried.
        if attempt(bench, grid, work, replace(case, optional=layers != work.k2_layers[-1])):
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
    found = bench.attempt(
        name, lambda: measure(bench, grid, case, work.rounds), needs, case.optional, **labels
    )
    return found is not None


def measure(bench: Bench, grid: ProcessGrid, case: Case, rounds: int) -> Mapping[str, Any]:
    """Seconds, model FLOP/s and peak memory of one engine."""
    total, states = bench.total_bytes(), states_bytes(case.shape, "bf16")
    if total is not None and states > SPARE * total:
        raise UnavailableError(f"states alone need {bytes_text(states)} of {bytes_text(total)}")

    before = bench.held_bytes()
    engine = make_engine(grid, case.shape, case.batch, case.microbatches, case.kernels)
    if not case.attention:
        leave_out_attention(engine)
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
        "attention": case.attention,
        "peak_bytes": above(peak, before),
        # The plan is of a model with attention.
        "planned_bytes": plan.total_bytes if case.attention else None,
        "plan": asdict(plan),
        "states_measured_bytes": above(held, before),
        "states_planned_bytes": states,
        "loss": last.loss,
    }


def leave_out_attention(engine: Engine) -> None:
    """Let every layer take the values [b, n, s, d] for its attention's output."""
    assert engine.architecture.num_heads == engine.architecture.num_kv_heads, "heads are grouped"
    for stage in engine.stages.values():
        for module in stage.modules():
            if isinstance(module, Attention):
                module.kernel = lambda q, k, v, mask: v


def rates(case: Case, step: float | None, inner: float | None) -> dict[str, float | None]:
    """Tokens and model FLOPs per second.

    With `causal`, without the pairs that causality excludes. A case without attention has no
    pairs.
    """
    tokens, shape, length = (
        case.batch.tokens * case.microbatches,
        case.shape,
        case.batch.length_tokens,
    )
    flops = tokens * flops_per_token(shape, length)
    left_out = 6 * tokens * shape.num_layers * length * shape.hidden_size
    if not case.attention:
        # Scores and their product with the values: 12 h s a token and layer, both directions.
        flops, left_out = flops - 2 * left_out, 0

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
