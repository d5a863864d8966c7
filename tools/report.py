"""Write the report of a run: one self-contained HTML page with curves, tables and events.

    python tools/report.py RUN [--to FILE] [--compare RUN] [--watch SECONDS]

- Reads the record only, and needs no torch or network: it works on a login node while the run
  trains. `--watch` writes the page again and again until the run has ended, and the browser loads
  it again.

Exit codes: 0 done; 2 a mistake in usage or a damaged ledger, one line on stderr; 1 the page cannot
be written. What is there and is no page is never replaced.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command, positive

from k2train.errors import EXIT_DONE, RunError, UnavailableError
from k2train.record.events import Failed, Finished, Resumed, Started, Stopped
from k2train.report.collect import RunView, read_run
from k2train.report.page import DOCTYPE, write_report
from k2train.retry import exists_retried, is_file_retried, is_folder_retried, open_retried
from k2train.text import bytes_text


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(prog="report.py", description="Write the report of a run as an HTML page.")
    parser.add_argument("run", type=Path, metavar="RUN", help="for example runs/demo-stage1")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where; default: RUN/report.html")
    parser.add_argument(
        "--compare", type=Path, metavar="RUN", help="draw the curves of this run beside it"
    )
    parser.add_argument(
        "--watch",
        type=positive,
        metavar="SECONDS",
        help="write it again so often, to the run's end",
    )
    options = parser.parse_args(arguments)
    path = options.to or options.run / "report.html"
    refuse_other(path)

    while True:
        run = read_run(options.run)
        other = None if options.compare is None else read_run(options.compare)
        goes_on = options.watch is not None and not has_ended(run)
        try:
            size = write_report(path, run, other, options.watch if goes_on else None)
        except OSError as error:
            raise UnavailableError(f"{path} cannot be written: {error.strerror}") from None
        print(f"{path}: {run.name}, step {run.last_step:,}, {bytes_text(size)}", flush=True)
        if not goes_on:
            return EXIT_DONE
        time.sleep(options.watch)


def refuse_other(path: Path) -> None:
    """Raise RunError where `path` is something else than a page, which would be lost."""
    if not exists_retried(path) or is_folder_retried(path):
        # A folder refuses by itself.
        return
    start = None
    if is_file_retried(path):
        with open_retried(path) as stream:
            start = stream.read(len(DOCTYPE))
    # An empty file, and a page: nothing is lost. A device is no file, and would be replaced by one.
    if start is None or not DOCTYPE.startswith(start):
        raise RunError(f"--to: {path} exists and is no HTML page; name a new file")


def has_ended(run: RunView) -> bool:
    """Whether the last start of a run has recorded its end."""
    for event in reversed(run.events):
        if isinstance(event, Finished | Stopped | Failed):
            return True
        if isinstance(event, Started | Resumed):
            return False
    return False


if __name__ == "__main__":
    sys.exit(main())
