"""Data pipeline benchmark: each stage against a simple baseline, as ratios within one run.

    python tools/bench_data.py [--only NAME ...] [--rounds N] [--folder DIR]

- Stage and baseline are measured in turns, and the median is shown: absolute rates belong to a
  machine, ratios mostly do not.
- The text is the standard library of the Python that runs this; the folders are temporary.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command

from benchmarks.data_preparation import bench_chunk, bench_cores, bench_encode, bench_memory
from benchmarks.data_reading import bench_import, bench_loader
from k2train.errors import EXIT_DONE

BENCHES = {
    "encode": bench_encode,
    "cores": bench_cores,
    "chunk": bench_chunk,
    "loader": bench_loader,
    "import": bench_import,
    "memory": bench_memory,
}


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(
        prog="bench_data.py", description="Ratios of the data pipeline, measured in one run."
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(BENCHES), default=list(BENCHES), help="benchmarks to run"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="repetitions of each measurement (default 5)"
    )
    parser.add_argument("--folder", type=Path, help="where the temporary folders are made")

    given = parser.parse_args(arguments)
    print(
        f"{'what':45}  {'against':24}  {'k2train':>10}  {'baseline':>10}  {'unit':8}  {'ratio':>8} "
        " aim"
    )

    for name in given.only:
        with tempfile.TemporaryDirectory(prefix="k2train-bench-", dir=given.folder) as folder:
            for figure in BENCHES[name](Path(folder), given.rounds):
                print(
                    f"{figure.what:45}  {figure.against:24}  {figure.mine:10,.4g}  "
                    f"{figure.theirs:10,.4g}  {figure.unit:8}  {figure.ratio:8.4g}  {figure.aim}",
                    flush=True,
                )
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
