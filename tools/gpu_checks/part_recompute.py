"""GPU check part `recompute`: what is computed again in the backward has the same bits."""

from functools import partial

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.engines import world_of_one
from gpu_checks.numerics import Trace, hold_same, small, trace

POLICIES = ("selective", "full")


def run(bench: Bench) -> None:
    """Compare every policy with keeping all activations."""
    work = small(bench.dry)
    known: list[Trace] = []

    def keep_all() -> dict[str, str]:
        known.append(trace(bench.device, work, "bf16"))
        return {"root": known[0].root, "kernels": known[0].kernels}

    def same(policy: str) -> dict[str, str]:
        found = trace(bench.device, work, "bf16", recompute=policy)
        return hold_same([known[0].root, found.root], "policies")

    with world_of_one(bench):
        bench.attempt("recompute none", keep_all)
        for policy in POLICIES if known else ():
            bench.attempt(f"recompute {policy} = none", partial(same, policy))
