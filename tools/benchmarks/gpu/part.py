"""Process of one GPU benchmark part.

python -m benchmarks.gpu.part --part NAME --rows FILE --seconds N [--dry-run]
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench

# Parts start in any order: what torch's import took is the part's time too.
BEGAN = time.monotonic()


def main() -> int:
    """Run the part named by the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    device = torch.device("cpu") if given.dry_run else torch.device("cuda", 0)

    with given.rows.open("a") as rows:
        bench = Bench(given.part, device, given.dry_run, BEGAN + given.seconds, rows)
        if not given.dry_run and not torch.cuda.is_available():
            why = f"torch {torch.__version__} sees no CUDA device; --dry-run runs on the CPU"
            bench.emit("device", "no device", why)
            return 0
        if given.dry_run:
            torch.set_num_threads(1)
        importlib.import_module(f"benchmarks.gpu.part_{given.part}").run(bench)

    return 0


if __name__ == "__main__":
    sys.exit(main())
