"""GPU check part `ranks`: several ranks share the device, and compute what one does alone.

- Real kernels, streams and buffers of every rank, with tensor, sequence and data parallelism. The
  exchanges go through host memory (`K2TRAIN_RANKS_PER_DEVICE`): NCCL takes one rank a device.
- In fp32, where layouts differ by the order of sums only.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.bench import Bench
from gpu_checks.numerics import DifferentError
from gpu_checks.runs import Runs
from k2train.launch.environment import RANKS_PER_DEVICE

BOUND = 2e-4
"""Relative distance of a loss after a few steps."""


def run(bench: Bench) -> None:
    """Train on one rank, then on several, and compare the losses."""
    runs = Runs(bench, "fp32")
    ranks, steps = (2 if bench.dry else 4), runs.steps(6)

    def alone() -> Mapping[str, Any]:
        runs.train("alone", steps)
        return {"losses": runs.losses("alone")}

    def together() -> Mapping[str, Any]:
        runs.train(
            "together",
            steps,
            "parallel.tensor=2",
            processes=ranks,
            variables={RANKS_PER_DEVICE: str(ranks)},
        )
        ledger = (runs.path("together") / "ledger.jsonl").read_text(encoding="utf-8")
        # A launcher that lost its ranks would compare one rank with itself.
        assert f'"world_size":{ranks}' in ledger.replace(" ", ""), "the ranks did not meet"
        mine, theirs = runs.losses("together"), runs.losses("alone")
        apart = max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
        if not apart <= BOUND:
            raise DifferentError(f"losses {apart:.2e} apart (bound {BOUND:.0e})")
        return {"loss_distance": apart, "ranks": ranks}

    if bench.attempt("one rank", alone) is not None:
        bench.attempt(f"{ranks} ranks, tensor 2, on one device", together)
