"""Bench: what a rank sends, holds and reads at 480, 4,096 and 16,384 ranks, and how that grows.

    python tools/bench_growth.py [--worlds 480 4096 16384]

- No other process is started: groups, exchanges, manifests, heartbeats and the order of the data
  are those of one rank of a world that is not there.
- Each row stands beside the exponent that it may have. Seconds are CPU seconds of this process.

Exit codes: 0 done; 1 something grows faster than it may; 2 a mistake in usage.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command, positive

from k2train.errors import EXIT_DONE, EXIT_FAILED, ConfigError

STEP = 32
"""Ranks of one data-parallel rank of K2's grid."""


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="bench_growth", description="What grows with the number of ranks.")
    parser.add_argument(
        "--worlds",
        type=positive,
        nargs="+",
        default=[480, 4096, 16384],
        metavar="N",
        help="numbers of ranks, multiples of 32 (480 4096 16384)",
    )
    worlds = sorted(set(parser.parse_args(arguments).worlds))
    if odd := [world for world in worlds if world % STEP]:
        raise ConfigError(f"--worlds: {odd[0]} is no multiple of {STEP} (tensor 8 x pipeline 4)")

    if len(worlds) < 2:
        raise ConfigError(f"--worlds: {worlds[0]} alone does not grow; give two or more")

    warnings.filterwarnings("ignore", message="Set timeout is now only supported")
    growth = importlib.import_module("benchmarks.growth")
    with tempfile.TemporaryDirectory() as folder:
        lines, problems = growth.growth_report(Path(folder), worlds)
    print("\n".join([*lines, *problems]))
    return EXIT_FAILED if problems else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
