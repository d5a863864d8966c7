"""Fault injection runs: break a small run in every way of the table and record the results.

    python tools/fault_run.py [--rows 1 2 5-8] [--short] [--kills N] [--endurance N] [--seed S]
                              [--minutes M] [--page FILE] [--record FILE] [--keep DIR]
    python tools/fault_run.py --list

- Each row is an experiment on this machine with real processes, signals and files.
- After each attempt the tool looks for leftover processes, ports, locks and files. It verifies the
  checkpoints, and compares every step bit for bit with an undisturbed run.
- The record is written after each row, and in row 30 now and then. When the minutes are over, or
  at a SIGTERM, the row that runs ends early and says what is missing; a second SIGTERM is not
  waited for.
- Processes are forked from one warm parent: a cold start costs seconds, and some rows need a
  thousand. Some experiments use the launcher's command line, to show that it behaves the same.

Exit codes: 0 every row that ran held; 1 one did not; 2 a usage error.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from command_line import Parser, command

from fault_tests.cases import ROWS, listing, run_row
from fault_tests.processes import ForkServer
from fault_tests.report import page, remember, table_line
from fault_tests.result import MEDIUM, SHORT, Bench, Result


def rows_named(texts: Sequence[str]) -> list[int]:
    """Parse `1 2 5-8` to row numbers. Raises ValueError for a number without a row."""
    found: list[int] = []
    for text in texts:
        first, _, last = text.partition("-")
        found += range(int(first), int(last or first) + 1)

    wrong = sorted(set(found) - set(ROWS))
    if wrong and not any("-" in text for text in texts):
        raise ValueError(
            f"no row {', '.join(map(str, wrong))}; there are {', '.join(map(str, ROWS))}"
        )
    return [row for row in ROWS if row in found]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Without `--list`, `rows` becomes the numbers of the rows to run."""
    parser = Parser(
        prog="fault_run.py", description="Break a small run in every way of the table of faults."
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="N", help="only these, `1 2 5-8`; all when left out"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="print the rows and the fault points, and exit",
    )
    parser.add_argument(
        "--short", action="store_true", help="fewer faults of each kind, in about two minutes"
    )
    parser.add_argument(
        "--kills",
        type=int,
        metavar="N",
        help="SIGKILLs at random times in row 2, and half as many power cuts (40; short: 3)",
    )
    parser.add_argument(
        "--endurance", type=int, metavar="N", help="faults of the one run of row 30 (100; short: 8)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the random times and fault points (1)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="begin no row, and repeat no fault of a row, after M minutes",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the results page to FILE")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="add results to FILE; the page shows the newest of each row and seed",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in this new folder and keep it"
    )
    options = parser.parse_args(arguments)
    if options.list:
        return options

    try:
        options.rows = (
            rows_named(options.rows)
            if options.rows
            else [row for row in ROWS if not options.short or row in SHORT_ROWS]
        )
    except ValueError as error:
        parser.error(str(error))

    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep: {options.keep} exists already")
    return options


def run_rows(options: argparse.Namespace, scratch: Path) -> list[Result]:
    """Run the rows one after another; write record and page after each."""
    began = time.monotonic()
    results: list[Result] = []
    with ForkServer(scratch.resolve() / "server") as server:
        bench = Bench(
            server,
            scratch.resolve(),
            SHORT if options.short else MEDIUM,
            options.seed,
            options.kills if options.kills is not None else 3 if options.short else 40,
            options.endurance if options.endurance is not None else 8 if options.short else 100,
            log=lambda text: print(
                f"[{time.monotonic() - began:6.0f} s] {text}", file=sys.stderr, flush=True
            ),
        )

        if options.minutes is not None:
            bench.until = began + options.minutes * 60
        if options.record is not None:
            bench.keep = lambda result: remember(options.record, result, bench)
        signal.signal(signal.SIGTERM, partial(end_early, bench))

        for row in options.rows:
            if bench.time_is_up:
                bench.log(f"the time is up; not begun: row {row} and what follows")
                break
            results.append(run_row(bench, row))
            print(table_line(results[-1]), flush=True)

            # With a record the page also shows rows of earlier runs of this tool.
            shown = (
                results if options.record is None else remember(options.record, results[-1], bench)
            )
            if options.page is not None:
                options.page.parent.mkdir(parents=True, exist_ok=True)
                options.page.write_text(
                    page(shown, bench, time.monotonic() - began), encoding="utf-8"
                )

    return results


def end_early(bench: Bench, number: int, frame: object) -> None:
    """Handle SIGTERM: the time is up; the second one ends the tool, which still tidies up."""
    if bench.until == 0:
        sys.exit(128 + number)
    bench.until = 0


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    options = parse(arguments)
    if options.list:
        print(listing())
        return 0

    scratch = options.keep or Path(tempfile.mkdtemp(prefix="k2train-faults-"))
    results = run_rows(options, scratch)

    failed = [result for result in results if result.problems]
    for result in failed:
        print(
            "\n".join(f"row {result.row}: {problem}" for problem in result.problems),
            file=sys.stderr,
        )

    if options.keep is None and not failed:
        shutil.rmtree(scratch)
    elif failed:
        print(f"kept: {scratch}", file=sys.stderr)
    return 1 if failed else 0


SHORT_ROWS = (1, 2, 3, 30)

if __name__ == "__main__":
    sys.exit(main())
