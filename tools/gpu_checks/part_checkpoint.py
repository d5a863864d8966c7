"""GPU check part `checkpoint`: a run goes from the device to a CPU and back; all verifies."""

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.bench import Bench
from gpu_checks.runs import Runs


def run(bench: Bench) -> None:
    """Continue one run on device, CPU and device, then verify its checkpoints."""
    runs = Runs(bench, "bf16")
    done = [0]

    def train(steps: int, on_cpu: bool) -> Mapping[str, Any]:
        runs.train("moved", steps, on_cpu=on_cpu)
        done[0] += steps
        losses = runs.losses("moved")
        assert len(losses) == done[0], f"{len(losses)} steps on record, {done[0]} were asked for"
        return {"steps": done[0], "loss": losses[-1]}

    def verified() -> Mapping[str, Any]:
        runs.tool("verify_checkpoint", "--root", str(runs.path("moved")))
        return {"steps": done[0]}

    works = {
        "steps on the device": lambda: train(runs.steps(4), False),
        "the same run on a CPU": lambda: train(2, True),
        "the same run on the device": lambda: train(2, False),
        "all checkpoints, with the hash of the state": verified,
    }
    for what, work in works.items():
        if bench.attempt(what, work) is None:
            return
