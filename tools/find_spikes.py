"""Find spikes, restarts that lie and slow rises in a finished training series.

    python tools/find_spikes.py SERIES
    python tools/find_spikes.py SERIES --plot FILE.svg
    python tools/find_spikes.py SERIES --restarts

- SERIES is a run directory, its `metrics.jsonl`, or a CSV, TSV or JSON-lines file, also gzipped,
  with the columns `step` and `loss` and, where there, `grad_norm`, `update_norm` and `attempt`.
- The code is that of the run's own detector (`k2train.guard.spikes`): it says what it would have
  said, step by step, without knowing what follows.
- Prints one JSON object a line for each event. `--restarts` prints one for each attempt after the
  first, with the first step that differs from an earlier record of the same steps. What was
  searched, and how much was found, is told on stderr.
- Where the series holds every tenth step, windows count records, and the lines tell steps.

Exit codes: 0 done; 2 a mistake in usage or a file that is no series, one line on stderr.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command, positive

from k2train.errors import EXIT_DONE, RunError
from k2train.record.jsonl import json_value
from k2train.text import counted
from spike_search.picture import svg
from spike_search.restarts import boundaries
from spike_search.search import search
from spike_search.series import Series, read_series


@command
def main(arguments: Sequence[str]) -> int:
    """Read the series and print what was found; the exit code."""
    parser = Parser(description="Find loss spikes, bad restarts and drifts in a training series.")
    parser.add_argument("series", type=Path, metavar="SERIES", help="run directory or file")
    parser.add_argument(
        "--restarts", action="store_true", help="compare attempts where they overlap"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the series as SVG")
    parser.add_argument(
        "--stride", type=positive, metavar="STEPS", help="steps between two rows; found if left out"
    )
    options = parser.parse_args(arguments)

    series = read_series(options.series)
    for ours, name in series.columns.items():
        if ours != name.strip().lower():
            print(f"{options.series}: {ours} is column {name!a}", file=sys.stderr)

    # Nothing found is an answer, too: it says what was searched.
    searched = f"{options.series}: {rows_of(series)}"
    if options.restarts:
        edges = [*boundaries(series)]
        for edge in edges:
            print(json.dumps(json_value(edge.row())))
        print(f"{searched}; {counted(len(edges), 'restart')} compared", file=sys.stderr)
    found = [] if options.restarts and not options.plot else [*search(series, options.stride)]
    if not options.restarts:
        for event in found:
            print(json.dumps(json_value(event.row())))
        print(f"{searched}; {counted(len(found), 'event')}", file=sys.stderr)

    if options.plot is not None:
        try:
            options.plot.write_text(svg(series, found), encoding="utf-8")
        except OSError as problem:
            raise RunError(f"{problem.filename}: {problem.strerror}") from None
        print(f"{options.plot}: {counted(len(found), 'event')} drawn", file=sys.stderr)
    return EXIT_DONE


def rows_of(series: Series) -> str:
    """Return the extent of a series, such as `40 rows, steps 1 to 40, 1 attempt`."""
    attempts = series.attempts
    rows = counted(sum(len(one.rows) for one in attempts), "row")
    first, last = min(one.first for one in attempts), max(one.last for one in attempts)
    return f"{rows}, steps {first} to {last}, {counted(len(attempts), 'attempt')}"


if __name__ == "__main__":
    sys.exit(main())
