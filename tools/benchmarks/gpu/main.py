"""GPU benchmark runner: measures everything on one GPU within a time budget; the table comes last.

- What the interpreter lacks is named before the first part.
- Nothing is written outside `--folder`, compiler caches included; nothing is downloaded; no setting
  of the device is changed.

Exit codes: 0 every part has a result; 1 a part has none; 2 a usage error, a missing package, or no
device to measure.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import markdown, planner_facts
from benchmarks.gpu.requirements import check_requirements
from benchmarks.gpu.rows import Row
from benchmarks.gpu.runner import Given, Part, parts_without_result, results_folder, run_parts
from k2train.command_line import Parser
from k2train.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE

PARTS = {
    part.name: part
    for part in (
        Part("device", "benchmarks.gpu.part_device", 40, 20),
        Part("layers", "benchmarks.gpu.part_layers", 190, 45),
        Part("models", "benchmarks.gpu.part_models", 270, 60),
        Part("tp8", "benchmarks.gpu.part_tp8", 40, 25),
        Part("host", "benchmarks.gpu.part_host", 40, 25),
    )
}
"""In order of worth. Those with a compiler in them need most of the time."""
FILES = ("result.json", "planner.json", "table.md")
"""Results; the second only where there are facts for a planner."""


def read_arguments(arguments: Sequence[str]) -> Given:
    """Parse and check the command line."""
    parser = Parser(
        prog="bench.py gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="time for all of it (default 10)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="which parts"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="the same code on the CPU with tiny sizes"
    )

    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/bench_gpu"),
        help="where results go (default runs/bench_gpu)",
    )

    given = parser.parse_args(list(arguments))
    if not 0 < given.minutes < float("inf"):
        parser.error(f"--minutes must be above 0, is {given.minutes:g}")
    parts = tuple(part for name, part in PARTS.items() if name in given.only)
    return Given(given.folder.resolve(), parts, 60 * given.minutes, given.dry_run)


def write_results(given: Given, rows: Sequence[Row], seconds: float) -> str:
    """Write `result.json`, `planner.json` and `table.md` into the folder; returns the table."""
    facts: Mapping[str, Any] = {
        "dry_run": given.dry_run,
        "seconds": round(seconds, 1),
        "rows": list(rows),
    }
    (given.folder / "result.json").write_text(json.dumps(facts, indent=1) + "\n")
    planner = planner_facts(rows)
    if planner is not None:
        (given.folder / "planner.json").write_text(json.dumps(planner, indent=1) + "\n")
    table = markdown(rows, given.dry_run, seconds)
    (given.folder / "table.md").write_text(table)
    return table


def main(arguments: Sequence[str]) -> int:
    """Run, and print the Markdown table last; returns the exit code."""
    given = read_arguments(arguments)
    check_requirements()
    began = time.monotonic()
    with results_folder(given.folder, FILES):
        rows = run_parts(given)
    missing = [row for row in rows if row["status"] == "no device"]
    if missing:
        print(f"bench.py gpu: {missing[0]['why']}", file=sys.stderr)
        return EXIT_USAGE

    table = write_results(given, rows, time.monotonic() - began)
    written = ", ".join(name for name in FILES if (given.folder / name).exists())
    print(f"written: {given.folder}: {written}", file=sys.stderr)
    print(table, end="")

    empty = parts_without_result(rows)
    if empty:
        print(f"bench.py gpu: no result of {', '.join(empty)}; see above", file=sys.stderr)
    return EXIT_FAILED if empty else EXIT_DONE
