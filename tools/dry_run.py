"""Dry run of one rank of any world: memory by kind, FLOPs and every collective, without a device.

    python tools/dry_run.py CONFIG.yaml --world 480 --rank 0 [dotted.key=value ...]
    python tools/dry_run.py CONFIG.yaml --world 480 --all-ranks

- The rank's real modules, schedule, gradient buffer and optimizer make a step on tensors without
  memory. A rank of K2 takes about 20 seconds.
- What the plan says stands beside it.
- `--all-ranks` runs the ranks that stand for all others, and compares who sends with who receives.

Exit codes: 0 done; 1 sends and receives do not meet; 2 a mistake in config or usage.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from command_line import Parser, command, positive

from k2train.config.load import load_config
from k2train.errors import EXIT_DONE, EXIT_FAILED
from k2train.text import bytes_text, table
from k2train.train.setup import Setup

if TYPE_CHECKING:
    from k2train.train.dry_run import DryRun

HEADINGS = ("  kind", "axis", "count", "bytes")


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = _parser()
    given = parser.parse_intermixed_args(arguments)
    if given.all_ranks and given.rank is not None:
        parser.error("--rank names one rank, --all-ranks takes them all: one of the two")
    config = load_config(given.config, given.overrides)
    world = given.world or config.parallel.tensor * config.parallel.pipeline
    # A layout that cannot be is told before torch is imported.
    Setup.of(config, world)
    rank = given.rank or 0
    if rank >= world:
        parser.error(f"--rank ({rank}) must be below --world ({world})")

    warnings.filterwarnings("ignore", message="Set timeout is now only supported")
    if not given.all_ranks:
        run = importlib.import_module("k2train.train.dry_run").dry_run(config, world, rank)
        print(json.dumps(_facts(run), indent=1) if given.json else _text(run))
        return EXIT_DONE

    peers = importlib.import_module("k2train.train.dry_peers")
    runs, problems = peers.dry_run_all(config, world, lambda text: print(text, file=sys.stderr))
    if given.json:
        print(json.dumps({"ranks": [_facts(run) for run in runs], "problems": problems}, indent=1))
    else:
        print(_all_text(runs, problems, world))
    return EXIT_FAILED if problems else EXIT_DONE


def _parser() -> Parser:
    parser = Parser(
        prog="dry_run",
        description="Build and step one rank of a world without a device: memory, FLOPs, "
        "collectives.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="dotted.key=value",
        help="values that replace the file's",
    )
    parser.add_argument(
        "--world", type=positive, metavar="N", help="processes (default: tensor x pipeline)"
    )
    parser.add_argument("--rank", type=_rank, metavar="R", help="world rank (default: 0)")
    parser.add_argument("--all-ranks", action="store_true", help="compare who sends and receives")
    parser.add_argument("--json", action="store_true", help="all numbers as JSON")
    return parser


def _rank(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, not {text!r}")
    return int(text)


def _transfers(run: DryRun) -> list[dict[str, Any]]:
    """Count and bytes of the collectives of a step, by kind and axis."""
    count = Counter((one.kind, one.axis) for one in run.transfers)
    size: Counter[tuple[str, str]] = Counter()
    for one in run.transfers:
        size[one.kind, one.axis] += one.num_bytes
    return [
        {"kind": kind, "axis": axis, "count": number, "bytes": size[kind, axis]}
        for (kind, axis), number in count.items()
    ]


def _facts(run: DryRun) -> dict[str, Any]:
    planned = asdict(run.planned)
    return {
        "rank": run.rank,
        "coordinate": run.coordinate,
        "micro_batches": run.num_microbatches,
        "state_bytes": run.state_bytes,
        "peak_bytes": run.peak_bytes,
        "at_peak_bytes": run.at_peak,
        "flops": run.flops,
        "collectives": _transfers(run),
        "planned": {
            **planned,
            "total_bytes": run.planned.total_bytes,
            "state_bytes": run.planned.state.total_bytes,
            "flops": run.planned_flops,
        },
    }


def _text(run: DryRun) -> str:
    flops, planned = sum(run.flops.values()), run.planned
    share = 100 * (run.peak_bytes / planned.total_bytes - 1)
    state = planned.state.total_bytes
    lines = [
        f"rank {run.rank} ({run.coordinate}), {run.num_microbatches:,} micro-batches a step",
        f"memory    state {bytes_text(run.state_bytes)}, planned {bytes_text(state)}",
        f"          peak {bytes_text(run.peak_bytes)}, planned {bytes_text(planned.total_bytes)} "
        f"({share:+.1f}%)",
        *(f"            {kind:<14}{bytes_text(size):>12}" for kind, size in run.at_peak.items()),
        f"FLOPs     {flops:.4e} a step, planned {run.planned_flops:.4e} "
        f"({100 * (flops / run.planned_flops - 1):+.2f}%)",
        *(f"            {kind:<14}{count:>12.4e}" for kind, count in run.flops.items()),
        "collectives of a step, bytes of this rank's largest tensor in each",
    ]
    rows = [
        (f"  {one['kind']}", one["axis"], str(one["count"]), bytes_text(one["bytes"]))
        for one in _transfers(run)
    ]
    return "\n".join([*lines, *table(HEADINGS, rows, left=HEADINGS[:2])])


def _all_text(runs: Sequence[DryRun], problems: Sequence[str], world: int) -> str:
    rows = [
        (
            f"{run.rank}",
            run.coordinate,
            bytes_text(run.peak_bytes),
            bytes_text(run.planned.total_bytes),
            f"{sum(run.flops.values()):.4e}",
            str(len(run.transfers)),
        )
        for run in runs
    ]
    header = ("rank", "coordinate", "peak", "planned", "FLOPs", "collectives")
    end = problems or [
        f"all {world} ranks: every send meets its receive, every collective its members"
    ]
    return "\n".join([*table(header, rows, left=("coordinate",)), *end])


if __name__ == "__main__":
    sys.exit(main())
