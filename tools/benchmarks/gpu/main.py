"""GPU benchmark runner: measures everything on one GPU within a time budget; the table comes last.

- Each part is a process of its own, and writes each row at once. So a part that dies, hangs or runs
  out of time leaves its rows, and a broken CUDA context or full memory ends one part only.
- Unused time of a part goes to the parts after it.
- Nothing is written outside `--folder`, compiler caches included; nothing is downloaded; no setting
  of the device is changed.

Alternatives considered:
- One process for everything: the first illegal address ends the rest too.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import command_of, last_line, run_to_end
from benchmarks.gpu.report import Row, markdown, planner_facts
from k2train.command_line import Parser
from k2train.errors import EXIT_DONE, EXIT_USAGE

GRACE_SECONDS = 8.0
"""Extra seconds after a part's deadline to finish its current timing, before it is ended."""

# Name -> weight of its share of the time. Those with a compiler in them need most.
PARTS = {"device": 30, "layers": 210, "models": 260, "tp8": 40, "host": 40}


@dataclass(frozen=True)
class Given:
    """The parsed command line."""

    folder: Path
    parts: tuple[str, ...]
    budget_seconds: float
    dry_run: bool


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
    if given.minutes <= 0:
        parser.error(f"--minutes must be above 0, is {given.minutes:g}")
    parts = tuple(name for name in PARTS if name in given.only)
    return Given(given.folder.resolve(), parts, 60 * given.minutes, given.dry_run)


def part_command(part: str, given: Given, seconds: float) -> list[str]:
    """Command of one part's process, with its compiler caches in the folder."""
    cache = given.folder / "cache"
    variables = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TOKENIZERS_PARALLELISM": "false",
    }

    arguments = [
        "--part",
        part,
        "--rows",
        str(rows_file(given, part)),
        "--seconds",
        f"{seconds:.1f}",
    ]

    return command_of(
        "benchmarks.gpu.part", [*arguments, *(["--dry-run"] if given.dry_run else [])], variables
    )


def rows_file(given: Given, part: str) -> Path:
    """File of a part's rows."""
    return given.folder / f"rows_{part}.jsonl"


def run_part(part: str, given: Given, seconds: float) -> list[Row]:
    """Run one part to its end or its time limit.

    Returns its rows, and one more if it ended badly.
    """
    rows_file(given, part).write_text("")
    log = given.folder / f"log_{part}.txt"
    code = run_to_end(part_command(part, given, seconds), log, seconds + GRACE_SECONDS)
    rows, underway = read_rows(rows_file(given, part))
    if code is None:
        rows.append(ended(part, underway, f"ended after {seconds + GRACE_SECONDS:.0f} s"))
    elif code != 0:
        rows.append(ended(part, underway, f"exit code {code}: {last_line(log)}"))
    return rows


def ended(part: str, underway: str, why: str) -> Row:
    """Row for a part that ended before its work was finished."""
    return {"part": part, "what": underway or "(start)", "status": "failed", "why": why}


def read_rows(path: Path) -> tuple[list[Row], str]:
    """Finished rows of a part, and the work that was started and not finished."""
    rows: list[Row] = []
    underway = ""

    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut in the middle when the part was ended
        if row["status"] == "begun":
            underway = row["what"]
        else:
            rows.append(row)
            underway = ""

    return rows, underway


def run_parts(given: Given) -> list[Row]:
    """Run all parts one after another.

    The remaining time is shared by weight among remaining parts.
    """
    began, rows = time.monotonic(), []
    for number, part in enumerate(given.parts):
        left = given.budget_seconds - (time.monotonic() - began)
        weights = [PARTS[name] for name in given.parts[number:]]
        seconds = left * weights[0] / sum(weights) - GRACE_SECONDS
        if seconds < min(5.0, given.budget_seconds / 2):
            rows.append(
                {
                    "part": part,
                    "what": "(all)",
                    "status": "skipped",
                    "why": f"{max(left, 0):.0f} s were left",
                }
            )
            continue
        print(f"{part}: up to {seconds:.0f} s", file=sys.stderr, flush=True)
        found = run_part(part, given, seconds)
        rows += found
        if any(row["status"] == "no device" for row in found):
            break

    return rows


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
    """Run, and print the Markdown table last; returns 2 when there is no device to measure."""
    given = read_arguments(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows = run_parts(given)
    shutil.rmtree(given.folder / "cache", ignore_errors=True)
    missing = [row for row in rows if row["status"] == "no device"]
    if missing:
        print(f"bench.py gpu: {missing[0]['why']}", file=sys.stderr)
        return EXIT_USAGE

    table = write_results(given, rows, time.monotonic() - began)
    print(f"written: {given.folder}/result.json, planner.json, table.md", file=sys.stderr)
    print(table, end="")
    return EXIT_DONE
