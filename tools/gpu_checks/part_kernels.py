"""GPU check part `kernels`: every choice of every kernel key against the references.

- The choices are read from the config's schema, so a new kernel is checked without a change here.
- One choice differs from the references at a time. Losses of two steps and all gradients of the
  first one are compared: forward, backward and update.
- Attention that stops at document borders is compared with the reference's dense mask.
- A choice that this machine has not is told, and is no failure.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import world_of_one
from benchmarks.gpu.part_layers import kernels_with
from gpu_checks.numerics import Trace, distance, hold_within, small, trace
from gpu_checks.part_parity import BF16, FP32
from k2train.config.schema import KernelsConfig

BASE = {
    "attention": "reference",
    "norm": "reference",
    "elementwise": "reference",
    "loss": "reference",
    "matmul": "torch",
    "optimizer": "reference",
    "compile": "off",
}
FP8 = {"loss": 5e-2, "gradient": 0.5}
"""Bounds of 8-bit products: their values have 3 bits, each is up to 6 % off."""
WITHIN = ("auto", "sdpa", "flash", "flash_attn_2", "flash_attn_3", "flash_attn_4")
"""Attention kernels that stop at document borders on a device."""
STEPS = 2
OTHER_PARTS = ("recompute",)
"""Keys that a part of its own checks, more strictly."""


def choices() -> Iterator[tuple[str, str]]:
    """(key, value) of every choice by name in the config's kernels, but the references."""
    for key, field in KernelsConfig.model_fields.items():
        for value in get_args(field.annotation):
            named = isinstance(value, str) and value not in ("auto", BASE.get(key))
            if named and key not in OTHER_PARTS:
                yield key, value


def run(bench: Bench) -> None:
    """Compare every choice in both precisions."""
    work = small(bench.dry)
    with world_of_one(bench):
        for precision, bounds in (("bf16", BF16), ("fp32", FP32)):
            known: list[Trace] = []

            def base(precision: str = precision, known: list[Trace] = known) -> Mapping[str, Any]:
                known.append(trace(bench.device, work, precision, STEPS, **BASE))
                return {"kernels": known[0].kernels}

            bench.attempt(f"{precision}, references", base)
            if not known:
                continue
            for key, value in choices():
                what = f"{precision}, {key} {value}"
                if bench.dry and (key, value) == ("compile", "on"):
                    bench.emit(what, "unavailable", "a dry run waits for no compiler")
                    continue
                allowed = FP8 if value == "fp8" else bounds
                work_of = partial(changed, bench, precision, known[0], allowed, key, value)
                bench.attempt(what, work_of, optional=True)
        within_documents(bench)


def within_documents(bench: Bench) -> None:
    """Compare every way to stop at document borders with the dense mask, in bf16."""
    work = replace(small(bench.dry), documents=True)
    known: list[Trace] = []

    def base() -> Mapping[str, Any]:
        known.append(trace(bench.device, work, "bf16", STEPS, **BASE))
        return {"kernels": known[0].kernels}

    def beside(name: str) -> Mapping[str, Any]:
        found = trace(bench.device, work, "bf16", STEPS, **{**BASE, "attention": name})
        return {**hold_within(distance(found, known[0]), **BF16), "kernels": found.kernels}

    bench.attempt("bf16, documents, references", base)
    for name in WITHIN if known else ():
        what = f"bf16, documents, attention {name}"
        bench.attempt(what, partial(beside, name), optional=True)


def changed(
    bench: Bench,
    precision: str,
    base: Trace,
    bounds: Mapping[str, float],
    key: str,
    value: str,
) -> Mapping[str, Any]:
    """Figures of one choice beside the references."""
    kernels = {**BASE, **kernels_with(key, value)}
    found = trace(bench.device, small(bench.dry), precision, STEPS, **kernels)
    return {**hold_within(distance(found, base), **bounds), "kernels": found.kernels}
