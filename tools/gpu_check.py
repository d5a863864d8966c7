"""Check of one GPU: correct first, then fast; one JSON file and one page of results.

    python tools/gpu_check.py [--minutes N] [--only PART ...] [--folder DIR] [--dry-run] [--list]

- `scripts/gpu_check.sh` starts it from a bare checkout with any Python that has a CUDA torch.
- Each part is a process with a time limit of its own, in order of worth. A failure ends no other
  part. What has no time is named as not run.
- The result is written after every part: a check that is ended early keeps what it has found.
- Nothing is written outside the folder, nothing is downloaded, no setting of the device is changed.

Exit codes: 0 every part ran and held; 1 a part failed or did not run; 2 a usage error, a missing
package, or no device.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from command_line import Parser, command

from benchmarks.gpu.requirements import check_requirements
from benchmarks.gpu.rows import Row
from benchmarks.gpu.runner import Given, results_folder, run_parts
from gpu_checks.catalogue import CATALOGUE
from gpu_checks.page import page
from gpu_checks.results import CheckResult, result_of, write_result
from k2train.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE

DEFAULT_MINUTES = 8.0
FOLDER = Path("runs/gpu_check")
RESULT_FILE = "result.json"
PAGE_FILE = "page.md"


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(list(arguments))
    if options.list:
        for part in CATALOGUE.values():
            print(f"{part.name:12} {part.seconds:4.0f} s  {part.proves}")
        return EXIT_DONE

    check_requirements()
    parts = tuple(part for name, part in CATALOGUE.items() if name in options.only)
    folder, began = options.folder.resolve(), time.monotonic()

    def write(rows: Sequence[Row]) -> tuple[CheckResult, str]:
        result = result_of(parts, rows, options.dry_run, time.monotonic() - began)
        return result, _write(result, folder)

    with results_folder(folder, (RESULT_FILE, PAGE_FILE)):
        given = Given(folder, parts, 60 * options.minutes, options.dry_run)
        rows = run_parts(given, keep=write)

    absent = [row for row in rows if row["status"] == "no device"]
    if absent:
        print(f"gpu_check: {absent[0]['why']}", file=sys.stderr)
        return EXIT_USAGE

    result, text = write(rows)
    return _report(result, text, folder)


def _write(result: CheckResult, folder: Path) -> str:
    """Write the result and its page; returns the page."""
    write_result(result, folder / RESULT_FILE)
    text = page(result)
    (folder / PAGE_FILE).write_text(text, encoding="utf-8")
    return text


def _report(result: CheckResult, text: str, folder: Path) -> int:
    print(f"written: {folder}: {RESULT_FILE}, {PAGE_FILE}", file=sys.stderr)
    print(text, end="")

    bad = [f"{part.part} {part.verdict}" for part in result.parts if part.verdict != "held"]
    if bad:
        print(f"gpu_check: {', '.join(bad)}; see above", file=sys.stderr)
    return EXIT_DONE if result.held else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gpu_check", description="Is one GPU computing right, and how fast?")
    parser.add_argument(
        "--minutes",
        type=_minutes,
        default=DEFAULT_MINUTES,
        metavar="N",
        help=f"time for all of it, default {DEFAULT_MINUTES:g}; what has no time is named",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(CATALOGUE),
        default=list(CATALOGUE),
        metavar="PART",
        help=f"these parts only: {', '.join(CATALOGUE)}",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=FOLDER,
        metavar="DIR",
        help=f"where results go, default {FOLDER}",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="the same parts on the CPU with tiny sizes"
    )
    parser.add_argument("--list", action="store_true", help="name the parts, and run nothing")
    return parser


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def _end(number: int, frame: FrameType | None) -> None:
    """End as with Ctrl-C, so that the started processes end, too. With a text, exit code 1."""
    sys.exit(f"gpu_check: ended by {signal.Signals(number).name}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    # The end of a terminal, unless nohup said to go on without it.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _end)
    sys.exit(main())
