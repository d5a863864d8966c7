"""Processes of one bench: each is a rank that takes steps of several configs in turns.

- The worker is `benchmarks.schedules`. This driver imports no torch.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.processes import command_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "demo" / "stage1.yaml"
"""The config that `runs` override."""


def run_ranks(
    runs: Sequence[Sequence[str]], processes: int, steps: int, warmup: int, threads: int
) -> list[Any] | None:
    """Measurements of each rank in rank order; None after printing what failed."""
    with TemporaryDirectory(prefix="bench-ranks-") as name:
        folder = Path(name)
        task = {
            "config": str(CONFIG),
            "runs": runs,
            "world": processes,
            "store": str(folder / "store"),
            "steps": steps,
            "warmup": warmup,
            "threads": threads,
        }

        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        started = [
            subprocess.Popen(
                command_of("benchmarks.schedules", [str(folder / "task.json"), str(rank)])
            )
            for rank in range(processes)
        ]

        try:
            codes = [process.wait() for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()

        for rank, code in enumerate(codes):
            if code:
                print(f"process {rank} ended with exit code {code}", file=sys.stderr)
                return None

        return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(processes)]
