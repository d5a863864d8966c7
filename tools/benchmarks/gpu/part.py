"""Process of one part: `run(bench)` of a module, with a device, a deadline and a file for rows.

    python -m benchmarks.gpu.part --part NAME --module MODULE --folder DIR --rows FILE --seconds N
                                  [--dry-run]

- The deadline counts from the start of this process: importing torch is the part's time, too.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import process_start_seconds
from k2train.launch.environment_defaults import set_environment_defaults


def main() -> int:
    """Run the part named by the command line."""
    # As training does, before the device is first used.
    set_environment_defaults(world_size=1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    device = torch.device("cpu") if given.dry_run else torch.device("cuda", 0)

    with given.rows.open("a") as rows:
        deadline = process_start_seconds() + given.seconds
        bench = Bench(given.part, device, given.dry_run, deadline, rows, given.folder)
        if not given.dry_run and not torch.cuda.is_available():
            why = f"torch {torch.__version__} sees no CUDA device; --dry-run runs on the CPU"
            bench.emit("device", "no device", why)
            return 0
        if given.dry_run:
            torch.set_num_threads(1)
        importlib.import_module(given.module).run(bench)

    return 0


if __name__ == "__main__":
    sys.exit(main())
