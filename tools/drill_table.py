"""Leave out each item of the state on purpose, and show at which step the resume drill finds it.

    python tools/drill_table.py RUN N

Copies of checkpoint N are saved without an item each, with hashes and digests made anew, and the
two recorded steps after it are done from each of them. Prints a table in Markdown.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command, positive

from k2train.launch.environment import Launch
from k2train.launch.environment_defaults import set_environment_defaults
from k2train.replay.begin import Place
from k2train.replay.recorded_run import RecordedRun


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = Parser(
        prog="drill_table.py", description="Which step finds which lost item of the state."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument("number", type=positive, metavar="N", help="a checkpoint, by its number")
    given = parser.parse_args(arguments)
    run = RecordedRun.read(given.run)
    run.checkpoint(given.number)

    # Before torch, which reads them once.
    set_environment_defaults(1, deterministic=True)
    program = importlib.import_module("k2train.replay.program")
    lines, code = program.drill_table(Launch(0, 1, 0, launched=False), run, given.number, Place(1))
    for line in lines:
        print(line)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
