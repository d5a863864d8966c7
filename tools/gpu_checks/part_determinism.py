"""GPU check part `determinism`: the same steps from the same weights, three times, bit for bit.

- Once more in another process, which compiles every kernel itself, as a start on another machine.
- The hash covers all weights and moments after several steps: one bit of one gradient shows.
- Every attention kernel by name, since its backward is where a device adds in any order. One that
  the config refuses with `kernels.deterministic: true`, the default, is told.
- What `kernels.deterministic: false` does to the bits is told and not judged.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import world_of_one
from gpu_checks.compiled_anew import root_compiled_anew
from gpu_checks.numerics import (
    STEPS,
    build_engine,
    hold_same,
    root_of,
    small,
    trace,
    trace_of,
)

REPEATS = 3
ATTENTION = (
    "sdpa",
    "flash",
    "cudnn",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "transformer_engine",
)


def run(bench: Bench) -> None:
    """Repeat steps, with the choices of `auto` first."""

    def repeated(documents: bool = False, **kernels: Any) -> Mapping[str, Any]:
        rows = replace(work, documents=documents)
        found = [trace(bench.device, rows, "bf16", **kernels) for _ in range(REPEATS)]
        roots = [one.root for one in found]
        return {**hold_same(roots, "equal runs"), "kernels": found[0].kernels}

    def free(**kernels: Any) -> Mapping[str, Any]:
        found = [trace(bench.device, work, "bf16", **kernels) for _ in range(REPEATS)]
        return {"states": len({one.root for one in found}), "kernels": found[0].kernels}

    def anew() -> Mapping[str, Any]:
        roots = [trace(bench.device, work, "bf16").root, root_compiled_anew(bench)]
        return hold_same(roots, "processes")

    work = small(bench.dry)
    with world_of_one(bench):
        bench.attempt("kernels auto", repeated)
        bench.attempt("kernels auto, within documents", partial(repeated, documents=True))
        bench.attempt("another process, compiled anew", anew)
        bench.attempt("hash on the device = hash on the CPU", lambda: digests(bench))
        for name in ATTENTION:
            choice = partial(repeated, attention=name)
            bench.attempt(f"attention {name}", choice, optional=True)
        unordered = partial(free, deterministic=False)
        bench.attempt("kernels.deterministic: false, not judged", unordered)


def digests(bench: Bench) -> Mapping[str, Any]:
    """The state's hash, computed on the device and on the CPU."""
    engine = build_engine(bench.device, small(bench.dry), "bf16")
    trace_of(engine, small(bench.dry))
    return hold_same([root_of(engine, STEPS), root_of(engine, STEPS, on_host=True)], "devices")
