"""GPU check part `trainer`: a run that was stopped and continued equals one that never was.

- Real command lines, with audits, forward check and saves; compared by `tools/compare_runs.py`:
  losses, the hash of the state at every audit, and every tensor of the last checkpoint.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.bench import Bench
from gpu_checks.runs import Runs


def run(bench: Bench) -> None:
    """Train, resume, train without a stop, and compare."""
    runs = Runs(bench, "bf16")
    first, more = runs.steps(12), runs.steps(6)

    def train(name: str, steps: int) -> Mapping[str, Any]:
        runs.train(name, steps)
        return {"steps": steps}

    def same() -> Mapping[str, Any]:
        paths = [str(runs.path(name)) for name in ("stopped", "whole")]
        runs.tool("compare_runs", *paths)
        losses = runs.losses("stopped"), runs.losses("whole")
        # Also by their number: two empty records would be equal.
        assert len(losses[0]) == first + more and losses[0] == losses[1], "losses differ"
        return {"steps": len(losses[0]), "losses": [losses[0][0], losses[0][-1]]}

    works = {
        f"{first} steps, save, stop": lambda: train("stopped", first),
        f"resume, {more} steps more": lambda: train("stopped", more),
        f"{first + more} steps without a stop": lambda: train("whole", first + more),
        "the same bits": same,
    }
    for what, work in works.items():
        if bench.attempt(what, work) is None:
            return
